"""One image from disk to a k-NN number, on a cut of scenes_cpu: the whole toolkit in one breath."""

import json

import pytest
import torch

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.eval.knn import vote
from dinokit.features import extract
from dinokit.weights import load_backbone

CUT = [
    "optim.steps=30", "optim.batch=16", "optim.warmup=5", "teacher.temp_warmup=10",
    "backbone.depth=2", "backbone.width=48",
    "heads.cls.prototypes=128", "heads.cls.hidden=64", "heads.cls.bottleneck=32",
    "data.count=200", "data.test_count=100",
    "run.workers=0", "run.precision=fp32", "run.log_every=10",
    "evals.knn.k=[10]", "evals.knn.every=30", "evals.knn.workers=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "walk"
    assert main(["train", "scenes_cpu", *CUT, f"run.out={out}"]) == 0
    return out


def test_the_run_was_watched_by_knn(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["knn/top1@10"] for line in lines if "knn/top1@10" in line]
    assert len(scores) == 2  # before the first step, and after the last


def test_the_last_line_of_its_evaluation_is_json(run, capsys):
    assert main(["eval", "knn", f"weights={run}", "k=[10]"]) == 0  # on the data that it was trained on
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images_train"] == 200
    assert result["images_test"] == 100


def test_the_recipe_it_saved_is_the_recipe_it_ran(run):
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.optim.steps == 30
    assert recipe.backbone["width"] == 48
    assert recipe.run.out == str(run)


def test_the_walk_by_hand(run):
    """Source, weights, features, vote: four calls from files to classes."""
    recipe = load_recipe(run / "recipe.yaml")
    source = registry.build("data.sources", {**recipe.data, "split": "train"})
    features = extract(load_backbone(run), source, resize=64, size=64, batch=32, workers=0)
    votes = vote(features.x, features.x, features.y, k=1, temp=0.07, classes=10)
    assert torch.equal(votes.argmax(dim=1), features.y)  # each image is its own nearest neighbour
    assert torch.equal(features.y, torch.tensor([source[i][1] for i in range(200)]))
