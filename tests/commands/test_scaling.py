"""dinokit scaling: which trainings it starts, on which cores, and how it sums their speeds."""

import json
import os
import sys
from collections import Counter

import pytest

from dinokit.__main__ import main
from dinokit.commands.scaling import speeds
from dinokit.train.choose import LOOKED_AT

WATCHED = """
import os
from dataclasses import dataclass
from dinokit.data.sources import scenes

@dataclass
class Config:
    pass

class Watched(scenes.Scenes):
    def __getitem__(self, index):
        core, = os.sched_getaffinity(0)
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{os.getpid()} {core} {os.environ.get('WORLD_SIZE', '1')}\\n")
        return super().__getitem__(index)

def build(cfg):
    return Watched(scenes.Config(size=64))
"""
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # macOS has no such call
SMALL = [
    "backbone.width=24", "backbone.depth=1", "heads.cls.hidden=16", "heads.cls.bottleneck=8",
    "optim.batch=8", "run.precision=fp32",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores that a process can be bound to")
def test_one_process_then_two_apart_then_two_together_share_the_same_batch(tmp_path, monkeypatch, capsys):
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched/__init__.py").touch()
    (tmp_path / "watched/scenes.py").write_text(WATCHED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WATCHED", str(tmp_path / "reads"))
    watched = ["scenes_cpu", *SMALL, "data.name=watched.scenes"]
    assert main(["scaling", *watched, "steps=6", "--rounds", "1"]) == 0

    reads = Counter(tuple(map(int, line.split())) for line in (tmp_path / "reads").read_text().splitlines())
    first, second = CORES[:2]
    steps = [
        (1, first, 6 * 4), (1, first, 6 * 8), (1, second, 6 * 4),  # apart, alone, apart
        (2, first, 6 * 4), (2, second, 6 * 4),  # together
    ]  # fmt: skip
    found = sorted((world, core, count) for (_, core, world), count in reads.items())
    assert [row[:2] for row in found] == [row[:2] for row in steps]
    # Before its steps a training looks at a sample of its images: as many as two seconds allow.
    looked = [row[2] - least[2] for row, least in zip(found, steps, strict=True)]
    assert all(0 < each <= LOOKED_AT for each in looked[:3])
    assert sorted(each > 0 for each in looked[3:]) == [False, True]  # the first process alone

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["processes"] == 2
    assert result["ratio"] == result["several"] / result["one"]
    assert result["ceiling"] == result["apart"] / result["one"]
    assert result["reached"] == result["several"] / result["apart"]


def test_speeds_of_runs_side_by_side_are_summed_after_the_warm_up(tmp_path):
    for name, rates in {"a": [1, 2, 3, 4, 5], "b": [10, 20, 30, 40, 60]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i + 1, "images_per_second": rate}) for i, rate in enumerate(rates)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    assert speeds([tmp_path / "a"]) == [4, 5]
    assert speeds([tmp_path / "a", tmp_path / "b"]) == [44, 65]


def test_a_batch_that_cannot_be_divided_is_refused_before_training(capsys):
    assert main(["scaling", "scenes_cpu", "optim.batch=31", "processes=2"]) == 2
    assert "optim.batch=31 images cannot be divided evenly over 2 processes" in capsys.readouterr().err


def test_a_system_that_binds_no_process_to_a_core_is_named_before_training(monkeypatch, capsys):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert main(["scaling", "scenes_cpu"]) == 2
    assert f"Python on {sys.platform} cannot do that. Run it on Linux." in capsys.readouterr().err


def test_short_keys_are_read_and_those_that_scaling_sets_are_refused(capsys):
    assert main(["scaling", "scenes_cpu", "batch=31", "seed=1", "precision=fp32"]) == 2
    assert "optim.batch=31 images cannot be divided" in capsys.readouterr().err
    for text in ("device=cuda", "run.workers=2", "out=x", "evals.knn.every=5", "evals={knn: {}}"):
        assert main(["scaling", "scenes_cpu", text]) == 2
        section = "evals" if text.startswith("evals") else "run."
        assert f"{text}: scaling sets {section}" in capsys.readouterr().err
