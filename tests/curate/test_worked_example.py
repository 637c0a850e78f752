"""The worked example of docs/curation.md, typed."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from dinokit.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "curation.md"
TINY = [
    "backbone.size=32", "backbone.width=24", "backbone.depth=1", "backbone.heads=2", "backbone.patch=8",
    "heads.cls.prototypes=32", "heads.cls.hidden=32", "heads.cls.bottleneck=16", "crops.globals.size=32",
    "crops.locals.size=16", "crops.locals.count=1", "optim.steps=1", "optim.batch=4", "optim.warmup=0",
    "evals=null", "run.workers=0", "run.out=again",
]  # fmt: skip


def commands(headline):
    """Those of the first block below a headline, without comments."""
    block = re.search(rf"^## {headline}\n.*?^```\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_the_worked_example_makes_a_set_trains_on_it_and_finds_images(photos, weights, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    for name, target in {"POOL": "pool", "FLOWERS": "seeds", "MY_TEST_SET": "test"}.items():
        (photos / name).symlink_to(photos / target)
    (photos / "photo.jpg").symlink_to(photos / "test" / "32.jpg")
    (photos / "runs").mkdir()
    (photos / "runs" / "photos").symlink_to(weights)
    more = {
        "curate": ["embed.workers=0", "dedup.similarity=1", "dedup.against=1", "seeds.flowers.k=8"],
        "train": TINY,
        "search": [],
    }
    typed = commands("A worked example")
    assert [words[1] for words in typed] == list(more)
    for program, command, *words in typed:
        assert program == "dinokit"
        assert main([command, *words, *more[command]]) == 0, capsys.readouterr().err
    assert (photos / "curated" / "report.html").exists()
    with (photos / "curated" / "manifest.csv").open(newline="") as file:
        found = [Path(row["path"]).name[:2] for row in csv.DictReader(file)]
    assert len(found) == len(set(found)) > 5
    assert max(found) < "32"  # the photos from 32 on are in the test set
    assert (photos / "again").is_dir()
    assert (photos / "nearest.png").exists()
