"""A newcomer's loss, backbone, source and evaluator, each one file of another package, in a whole run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dinokit import __version__
from dinokit.__main__ import main

ROOT = Path(__file__).parent.parent
LOSS = """
from dataclasses import dataclass

from torch import nn


@dataclass
class Config:
    weight: float = 0.5


class Spread(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.weight = cfg.weight

    def forward(self, views):
        return -views.student_feature.float().var(dim=1).mean()


build = Spread
"""

BACKBONE = """
from dataclasses import dataclass

import torch
from torch import nn

from dinokit.models import Backbone, Input, Tokens


@dataclass
class Config:
    channels: int = 3
    width: int = 8


class Conv(Backbone):
    def __init__(self, cfg):
        super().__init__()
        self.width, self.patch, self.channels = cfg.width, 8, cfg.channels
        self.input = Input(32, (0.5,) * cfg.channels, (0.5,) * cfg.channels)
        self.stem = nn.Conv2d(cfg.channels, cfg.width, 8, stride=8)
        self.blocks = nn.ModuleList([nn.Linear(cfg.width, cfg.width)])

    def forward(self, crops, masks):
        rows = [self.blocks[0](self.stem(x).flatten(2).transpose(1, 2)) for x in crops]
        return [Tokens(cls=x.mean(dim=1), registers=x[:, :0], patches=x) for x in rows]


build = Conv
"""

SOURCE = """
import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass
class Config:
    count: int = 12
    channels: int = 3
    split: Literal["all", "train", "test"] = "all"


class Noise:
    classes = ("dark", "light")

    def __init__(self, cfg):
        self.cfg = cfg

    def __len__(self):
        return self.cfg.count

    def __getitem__(self, index):
        rng = np.random.default_rng([index, len(self.cfg.split)])
        label = index % 2
        return rng.integers(0, 100, (40, 40, 3), dtype=np.uint8) + np.uint8(100 * label), label

    def name(self, index):
        return f"noise {index}"


build = Noise
"""

EVALUATOR = """
from dataclasses import dataclass, field
from typing import Any

from dinokit.config import registry


@dataclass
class Config:
    test: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources", "split": "test"})
    factor: float = 2.0


def evaluate(cfg, backbone):
    images = len(registry.build("data.sources", cfg.test))
    return {"images": cfg.factor * images, "width": float(backbone.width)}
"""

RECIPE = """
backbone: {name: guest.conv}
heads: {cls: {prototypes: 8, hidden: 8, bottleneck: 4}}
losses: {dino: {}, guest.spread: {}}
crops: {globals: {size: 32}, locals: {count: 1, size: 16}}
data: {name: guest.noise, split: train}
optim: {steps: 3, batch: 4, lr: 1e-3}
evals: {guest.count: {every: 2}, knn: {every: 3, k: [3], workers: 0}}
run: {workers: 0, precision: fp32}
"""


@pytest.fixture
def guest(tmp_path, monkeypatch) -> Path:
    package = tmp_path / "guest"
    package.mkdir()
    files = {"spread": LOSS, "conv": BACKBONE, "noise": SOURCE, "count": EVALUATOR, "__init__": ""}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "guest"]:
        del sys.modules[name]


def test_four_files_from_outside_train_are_saved_and_evaluated(guest, capsys):
    out = guest / "run"
    assert main(["train", str(guest / "recipe.yaml"), f"run.out={out}", "--traceback"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("guest.spread" in line for line in lines)
    assert [line["step"] for line in lines if line.get("guest.count/images") == 24.0] == [0, 2, 3]
    assert main(["eval", "guest.count", f"weights={out}", "factor=1", "--traceback"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 12.0


@pytest.mark.skipif(not (ROOT / ".venv/bin/torchrun").exists(), reason="no environment of this clone")
def test_the_environment_of_a_clone_has_torchrun_and_works_above_the_clone(tmp_path):
    (tmp_path / "dinokit").symlink_to(ROOT)
    python, code = ROOT / ".venv/bin/python", "import dinokit, dinokit.eval; print(dinokit.__version__)"
    shown = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.strip() == __version__, shown.stderr
    command = [ROOT / ".venv/bin/torchrun", "--standalone", "-m", "dinokit", "--version"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.strip() == f"dinokit {__version__}", shown.stderr


@pytest.mark.parametrize("error", ["{}[0]", "[][3]", "open('nothing')", "int('x')"])
def test_an_error_of_a_foreign_evaluator_shows_its_type_and_its_line(tmp_path, monkeypatch, capsys, error):
    package = tmp_path / f"guest{abs(hash(error))}"
    package.mkdir()
    (package / "__init__.py").touch()
    config = EVALUATOR.split("def evaluate", maxsplit=1)[0]
    (package / "bad.py").write_text(f"{config}def evaluate(cfg, backbone):\n    {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = ["test.name=scenes", "test.size=32", "test.count=2", "test.test_count=2"]
    assert main(["eval", f"{package.name}.bad", "backbone.name=pixels", "device=cpu", *data]) in (1, 3)
    err = capsys.readouterr().err
    assert any(
        kind in err for kind in ("KeyError: 0", "IndexError: list", "FileNotFoundError: ", "ValueError: inv")
    )
    assert "bad.py, line " in err
    assert main(["eval", "knn", "backbone.name=pixels", "train.path=/no", "test.path=/no"]) == 3
    assert "line" not in capsys.readouterr().err  # our own are sentences
