"""What `dinokit watch` says about runs in every state."""

import json

import pytest

from dinokit.__main__ import main
from dinokit.config.load import load_recipe, to_yaml


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, last): a run of 1,000 steps of 16 images that has done 250, whose log ends with that line."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("scenes_cpu", ["optim.steps=1000", "optim.batch=16"])
    lines = [
        {"step": 0, "knn/top1@20": 0.1}, {"step": 250, "lr": 1e-3, "images_per_second": 10.0},
        {"step": 250, "knn/top1@20": 0.4},
    ]  # fmt: skip

    def make(name, last):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(to_yaml(recipe))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "run.log").write_text(
            f"2026-01-01 00:00:00  begins\n2026-01-01 00:00:01  {last}\n"
        )

    return make


def test_each_run_has_a_line(run, capsys):
    run("a", "step 250/1000  dino 1  left 0:20:00")
    run("b", "stopped after step 250; the same command resumes from here")
    run("c", "finished: c/teacher.safetensors")
    assert main(["watch", "a", "b", "c"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a  25%  250/1000  left 0:20:00  10 images/s  k-NN 0.400",
        "b  25%  250/1000  stopped  k-NN 0.400",
        "c  25%  250/1000  finished  k-NN 0.400",
    ]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "Give folders of runs" in capsys.readouterr().err
