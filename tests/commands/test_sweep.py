"""Sweeps with real runs in child processes, and tables of runs whose records are given."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dinokit.__main__ import main
from dinokit.commands._sweep_table import Point, score_at
from dinokit.commands.sweep import Config, _combinations, plan

RECIPE = """
backbone: {name: vit, size: 32, width: 24, depth: 1, heads: 2, patch: 8, layer_scale: 1.0}
heads: {cls: {prototypes: 16, hidden: 16, bottleneck: 8}}
losses: {dino: {}, koleo: {}}
crops: {globals: {count: 2, size: 32}, locals: {count: 0}}
optim: {steps: 4, batch: 4, lr: 1e-3, lr_rule: none, warmup: 1}
data: {name: scenes, size: 32, split: train}
evals: {knn: {every: 2, k: [1], resize: 32, workers: 0, max_train: 20, max_test: 20}}
run: {precision: fp32, workers: 0, log_every: 1, checkpoint_every: 1, device: cpu}
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """sweep(text, *words): run `dinokit sweep` on a file with that text, in an empty folder. Its status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(RECIPE)

    def do(text, *words):
        (tmp_path / "study.yaml").write_text(text)
        return main(["sweep", "study.yaml", *words])

    return do


def records(folder, scores, seconds=1.0, verdict=None, finished=True):
    """A run of batch 4 with scores every 10 steps, and steps of so many seconds between them."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "knn/top1@1": scores[0]}]
    for number, score in enumerate(scores[1:], 1):
        lines.append({"step": 10 * number, "lr": 1e-3, "dino": 2.0, "images_per_second": 4 / seconds})
        lines.append({"step": 10 * number, "knn/top1@1": score, "health/feature_rank": 3.0})
    if verdict:
        lines.append({"step": lines[-1]["step"], "verdict": verdict})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.log").write_text(
        "2026-01-01 00:00:00  finished: teacher.safetensors\n" if finished else ""
    )


def test_every_combination_of_a_grid_is_a_row():
    rows = _combinations({"optim.lr": [1e-4, 5e-4], "optim.betas": [[0.9, 0.95]], "data.name": ["scenes"]})
    assert rows == {
        "lr=0.0001 betas=[0.9, 0.95] name=scenes": [
            "optim.lr=0.0001", "optim.betas=[0.9, 0.95]", 'data.name="scenes"',
        ],
        "lr=0.0005 betas=[0.9, 0.95] name=scenes": [
            "optim.lr=0.0005", "optim.betas=[0.9, 0.95]", 'data.name="scenes"',
        ],
    }  # fmt: skip
    both = _combinations({"crops.globals.size": [32], "crops.locals.size": [16]})
    assert list(both) == ["crops.globals.size=32 crops.locals.size=16"]


def test_rows_get_folders_of_their_own_and_the_first_seed_comes_first(tmp_path):
    cfg = Config("scenes_cpu", ["optim.batch=16"], {"optim.lr": [1e-4, 2e-4]}, seeds=[0, 7])
    runs = plan(cfg, tmp_path)
    assert [run.out.name for run in runs] == [
        "lr-0.0001-seed0", "lr-0.0002-seed0", "lr-0.0001-seed7", "lr-0.0002-seed7",
    ]  # fmt: skip
    assert (runs[3].recipe.optim.lr, runs[3].recipe.optim.batch, runs[3].recipe.run.seed) == (2e-4, 16, 7)
    assert runs[3].words[:2] == ["train", "scenes_cpu"]


def test_short_keys_are_read_in_the_file_and_behind_it_and_out_is_the_folder_of_the_sweep(sweep, capsys):
    text = "recipe: tiny.yaml\nset: [device=cpu]\ngrid: {batch: [2, 8]}\nout: other"
    assert sweep(text, "--dry-run", "out=runs/here", "seed=3", "weights=x.pth", "backbone.name=vit") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines] == [
        [f"optim.batch={size}", f"run.out=runs/here/batch-{size}"] for size in (2, 8)
    ]
    assert "run.device=cpu run.seed=3 backbone.weights=x.pth" in lines[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("recipe: tiny.yaml\nset: [run.out=runs/x]", "run.out=runs/x: a sweep chooses the folder"),
        ("grid: {optim.lr: [1]}", "recipe must be given"),
        ("recipe: tiny.yaml\nrow: {}", "Did you mean 'rows'?"),
        ("recipe: tiny.yaml\ngrid: {optim.lrr: [1]}", "row 'lrr=1': "),
        ("recipe: tiny.yaml\nrows: {a: []}\ngrid: {optim.lr: [1]}", "grid and rows are both given"),
        ("recipe: tiny.yaml\nrows: {a b: [], a-b: []}", "would share the folder a-b"),
        ("recipe: tiny.yaml\nrows: {a: []}", "No run in runs/study has a score"),
    ],
)
def test_a_wrong_file_is_explained(sweep, capsys, text, answer):
    assert sweep(text, "--table") == 2
    assert answer in capsys.readouterr().err


def test_scores_between_two_evaluations_are_interpolated():
    curve = [Point(0, 0.0, 0.1), Point(100, 2.0, 0.3)]
    assert score_at(curve, "images", 50) == pytest.approx(0.2)
    assert score_at(curve, "minutes", 0.5) == pytest.approx(0.15)
    assert score_at(curve, "images", 101) is None
    assert score_at(curve, "images", 100) == pytest.approx(0.3)


ROWS = "recipe: tiny.yaml\nrows: {slow: [optim.lr=1e-4], fast: [optim.lr=2e-3], late: []}\nseeds: [0, 1]"


def test_the_table_is_sorted_and_has_mean_and_spread_over_seeds(sweep, tmp_path, capsys):
    out = tmp_path / "runs" / "study"
    records(out / "slow-seed0", [0.1, 0.2, 0.3], verdict="noise")
    records(out / "slow-seed1", [0.1, 0.2, 0.4])
    records(out / "fast-seed0", [0.1, 0.5, 0.7], seconds=6.0)
    records(out / "fast-seed1", [0.1, 0.5], seconds=6.0, finished=False)
    assert sweep(ROWS, "--table") == 0
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == ["fast", "slow", "late"]
    fast, slow, late = lines
    assert (slow["score"], slow["spread"], slow["runs"]) == ("0.350", "0.071", "2/2")
    assert (slow["at 20 images"], slow["at 40 images"], slow["images"]) == ("0.150", "0.200", "80")
    assert slow["minutes"] == "0.3"  # 20 steps of a second
    assert (fast["score"], fast["runs"], fast["minutes"]) == ("0.700", "1/2", "2.0")
    assert slow["verdict"] == "noise"
    assert (late["score"], late["runs"]) == ("", "0/2")
    assert {p.name for p in out.iterdir()} >= {"table.md", "runs.json", "curves.svg", "curves.png"}
    assert (out / "table.md").read_text() in capsys.readouterr().out
    runs = json.loads((out / "runs.json").read_text())
    assert runs[1]["curve"][-1] == {"images": 80, "minutes": 2.0, "score": 0.7}
    drawing = (out / "curves.svg").read_text()
    assert "images seen" in drawing or "<svg" in drawing


def test_without_a_metric_the_first_score_ranks_by_its_own_kind_and_is_named(sweep, tmp_path, capsys):
    out = tmp_path / "runs" / "study"
    for row, error in (("worse", 0.9), ("better", 0.2)):
        records(out / row, [0.1])
        lines = [{"step": step, "depth/rmse": error, "depth/d1": 1 - error} for step in (0, 10)]
        (out / row / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sweep("recipe: tiny.yaml\nrows: {worse: [], better: [optim.lr=1e-4]}", "--table") == 0
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(line["row"], line["score"]) for line in lines] == [("better", "0.200"), ("worse", "0.900")]
    assert "the score is depth/rmse" in capsys.readouterr().out


def test_another_metric_can_be_tabulated(sweep, tmp_path):
    out = tmp_path / "runs" / "study"
    records(out / "base", [0.1, 0.2])
    assert sweep("recipe: tiny.yaml\nmetric: health/feature_rank", "--table") == 0
    assert "3.000" in (out / "table.csv").read_text()


def test_a_metric_that_no_run_can_have_is_refused_before_the_first_run(sweep, tmp_path, capsys):
    assert sweep("recipe: tiny.yaml\nmetric: kn/top1@1\nrows: {a: []}", "--dry-run") == 2
    assert "row 'a' has no evals.kn. Did you mean 'knn'?" in capsys.readouterr().err
    records(tmp_path / "runs/study/a", [0.1, 0.2])
    assert sweep("recipe: tiny.yaml\nmetric: knn/top1@2\nrows: {a: []}", "--table") == 2
    assert "Did you mean 'knn/top1@1'? There is: health/feature_rank, knn/top1@1." in capsys.readouterr().err


def test_of_errors_the_smallest_comes_first(sweep, tmp_path):
    for row, error in (("slow", 2.5), ("fast", 1.5)):
        out = tmp_path / "runs" / "study" / row
        records(out, [0.1])
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 10, "depth/rmse": error}) + "\n")
    assert (
        sweep("recipe: tiny.yaml\nmetric: depth/rmse\nrows: {slow: [], fast: [], late: []}", "--table") == 0
    )
    lines = list(csv.DictReader((tmp_path / "runs/study/table.csv").read_text().splitlines()))
    assert [(line["row"], line["score"]) for line in lines] == [
        ("fast", "1.500"),
        ("slow", "2.500"),
        ("late", ""),
    ]


def test_a_dry_run_prints_the_commands(sweep, capsys):
    assert (
        sweep(
            "recipe: tiny.yaml\ngrid: {optim.lr: [1e-4]}\nset: [optim.batch=8]", "--dry-run", "optim.steps=9"
        )
        == 0
    )
    assert capsys.readouterr().out == (
        "dinokit train tiny.yaml optim.batch=8 optim.steps=9 optim.lr=0.0001 run.out=runs/study/lr-0.0001\n"
    )


def test_an_array_of_jobs_has_the_remaining_runs(sweep, tmp_path, capsys):
    records(tmp_path / "runs" / "study" / "a", [0.1, 0.2])
    rows = "recipe: tiny.yaml\nrows: {a: [], b: [optim.lr=1e-4], c: [optim.lr=2e-4]}"
    assert sweep(rows, "--slurm=cpu", "--dry-run") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1" in script
    assert "run.out=runs/study/b; the array has 1 more jobs" in script


@pytest.mark.slow
def test_runs_are_made_once_and_a_changed_row_is_refused(sweep, tmp_path, capfd):
    text = "recipe: tiny.yaml\nrows: {base: []}"
    assert sweep(text) == 0
    out = tmp_path / "runs" / "study"
    assert (out / "base" / "teacher.safetensors").exists()
    assert "step 4/4" in (out / "base.log").read_text()
    printed = capfd.readouterr().out
    assert "run 1 of 1: runs/study/base" in printed
    assert "| base | 1/1  |" in printed
    before = (out / "base.log").stat().st_mtime_ns
    assert sweep(text) == 0
    assert "1 of 1 runs are finished already" in capfd.readouterr().out
    assert (out / "base.log").stat().st_mtime_ns == before
    assert sweep("recipe: tiny.yaml\nrows: {base: [optim.lr=5e-3]}") == 2
    assert "optim.lr was 0.001, now 0.005" in capfd.readouterr().err


@pytest.mark.slow
def test_a_failed_row_does_not_stop_the_others(sweep, tmp_path, capfd):
    broken = "data={name: folder, path: /nowhere}"
    assert sweep(f"recipe: tiny.yaml\nrows: {{broken: ['{broken}'], base: []}}") == 4
    caught = capfd.readouterr()
    assert "1 of 2 runs failed: broken (dinokit: " in caught.err
    assert "| base   | 1/1" in caught.out


@pytest.mark.slow
def test_a_full_disk_is_the_reason_also_when_there_is_no_score(sweep, tmp_path, capfd):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        assert (
            sweep(f"recipe: tiny.yaml\nset: [evals=null]\nrows: {{a: [], b: []}}\nout: {folder}/study") == 4
        )
        error = capfd.readouterr().err
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert re.search(
        r"of 2 runs failed: a \(dinokit: .* the disk is full.*; b \(dinokit: .* the disk is full", error
    )


@pytest.mark.slow
def test_an_interrupted_sweep_saves_and_resumes(sweep, tmp_path):
    (tmp_path / "study.yaml").write_text("recipe: tiny.yaml\nset: [optim.steps=40]\nseeds: [0, 1]")
    words = [sys.executable, "-m", "dinokit", "sweep", "study.yaml"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "study" / "base-seed0"
    end = time.monotonic() + 240
    while not (run / "checkpoints" / "step_0000003").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "the same command resumes" in err
    assert "stopped after step" in (run / "run.log").read_text()
    assert not (tmp_path / "runs" / "study" / "base-seed1").exists()
    subprocess.run(words, cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = (run / "run.log").read_text()
    assert "resumes after step" in log
    assert "2/2" in (tmp_path / "runs" / "study" / "table.md").read_text()
