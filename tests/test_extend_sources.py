"""What docs/extend.md says of an evaluator's sources, with an evaluator that knows nothing but that page."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from dinokit.__main__ import main

EVALUATOR = """
from dataclasses import dataclass
from typing import Any

from dinokit.config import registry
from dinokit.config.registry import source_field
from dinokit.data.sources import shared_images


@dataclass
class Config:
    train: dict[str, Any] | None = source_field("data.sources", "train")
    test: dict[str, Any] | None = source_field("data.sources", "test", labels=False)
    extra: dict[str, Any] | None = source_field("data.sources", "test", optional=True)
    more: dict[str, Any] | None = source_field("data.sources", "test", many=True)


def evaluate(cfg, backbone):
    train, test = (registry.build("data.sources", section) for section in (cfg.train, cfg.test))
    shapes = [len(source[0][0].getbands()) for source in (train, test)]
    more = {key: len(registry.build("data.sources", each)) for key, each in (cfg.more or {}).items()}
    return {
        "images_train": len(train), "images_test": len(test), "bands": sum(shapes),
        "extra": -1 if cfg.extra is None else len(registry.build("data.sources", cfg.extra)),
        "shared": len(shared_images(train, test)),
        **{f"more {key}": count for key, count in more.items()},
    }
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "__init__.py").touch()
    (tmp_path / "outside" / "counting.py").write_text(EVALUATOR)
    for split, count in (("train", 4), ("test", 2)):
        for kind in ("red", "blue"):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([number, count, len(kind)])
                pixels = rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "outside"]:
        del sys.modules[name]


def result(capsys, *words):
    status = main(["eval", "outside.counting", "backbone.name=pixels", *words])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out.strip().splitlines()[-1])


def test_sections_arrive_as_the_page_says(place, capsys):
    found = result(capsys, "train.path=train", "test.path=test")
    assert (found["images_train"], found["images_test"], found["bands"], found["extra"]) == (8, 4, 6, -1)
    more = ["extra.path=test", "more.A.path=test", "more.B.path=train"]
    found = result(capsys, "backbone.channels=1", "train.path=train", "test.path=train", *more)
    assert (found["bands"], found["extra"], found["more A"], found["more B"]) == (2, 4, 4, 8)
    assert found["shared"] == 8


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["test.path=test"], "train.path (a folder with one sub-folder a class) or train.name must be given"),
        (["train.path=train", "test.path=test", "test.colour=1"], "test.colour: there is no key 'colour'"),
        (["train.path=train", "test=test"], "test=test: it is a section. Give test.path=test"),
    ],
)
def test_what_is_missing_or_wrong_is_answered_before_the_evaluator_is_called(words, answer, place, capsys):
    assert main(["eval", "outside.counting", "backbone.name=pixels", *words]) == 2
    assert answer in capsys.readouterr().err


def test_in_a_training_the_sections_are_the_splits_of_its_images(place, capsys):
    words = ["optim.steps=2", "optim.batch=4", "optim.warmup=1", "run.workers=0", "run.report=false",
             "evals.knn=null", "evals.outside.counting.every=2", "run.out=run", "run.device=cpu",
             "data.name=folder", "data.path=.", "data.labels=folders", "data.test_share=0.5",
             "backbone.width=16", "backbone.depth=1", "backbone.heads=1"]  # fmt: skip
    status = main(["train", "scenes_cpu", *words])
    assert status == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "outside.counting/images_test" in line)
    counts = [found[f"outside.counting/images_{split}"] for split in ("train", "test")]
    assert sum(counts) == 12
    assert found["outside.counting/shared"] == 0
