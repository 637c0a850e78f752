"""Evaluators that were started by torchrun: the same scores as alone, printed once."""

import json
import subprocess
import sys

import pytest

DATA = "name: scenes, count: 90, test_count: 30"
RECIPE = f"""
all:
  train: {{{DATA}, split: train}}
  test: {{{DATA}, split: test}}
  workers: 0
  precision: fp32
knn: {{k: [5]}}
logreg: {{powers: [-1, 1], count: 2}}
retrieval: {{k: [1]}}
segmentation: {{method: knn, resize: 64}}
"""
ALONE = [sys.executable, "-W", "ignore", "-m", "dinokit"]
TORCHRUN = "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
TOGETHER = [sys.executable, "-W", "ignore", "-m", *TORCHRUN, "-m", "dinokit"]
MACHINE = "about", "weights"


def output(start, *words):
    process = subprocess.run([*start, *words], capture_output=True, text=True, timeout=300, check=False)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_the_first_says_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    found = []
    for name, start in (("alone", ALONE), ("together", TOGETHER)):
        backbone = "backbone.name=raw_patches", "backbone.size=64"
        words = [*backbone, f"out={tmp_path / name}", f"cache={tmp_path / name / 'cache'}", "device=cpu"]
        status, out, err = output(start, "eval", "all", f"recipe={tmp_path / 'mine.yaml'}", *words)
        assert status == 0, err
        found.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == found[-1]
    assert [each["eval"] for each in found[1]] == ["knn", "logreg", "retrieval", "segmentation"]
    for one, two in zip(*found, strict=True):
        alone, both = ({k: v for k, v in each.items() if k not in MACHINE} for each in (one, two))
        assert both == pytest.approx(alone, abs=1e-3)


@pytest.mark.slow
def test_a_mistake_is_reported_once_and_ends_all_processes(tmp_path):
    words = ["eval", "knn", "backbone.name=pixels", "train.path=nowhere", "test.path=nirgends", "device=cpu"]
    status, out, err = output(TOGETHER, *words)
    assert status != 0
    assert not out
    assert err.count("dinokit: ") == 1
    assert "nowhere" in err
