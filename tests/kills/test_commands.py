"""A command that is killed at any moment ends, by the same command, with the files of an undisturbed one.

Real signals, real files; half of the kills take the loader processes too, half leave them behind.
"""

import pytest

pytestmark = pytest.mark.slow


def test_training(scenario, recipe, kills):
    scenario(["train", recipe, "run.out=run"]).kill(kills)


def test_training_from_weights(scenario, recipe, trained, fewer):
    scenario(["train", recipe, "run.out=run", f"backbone.weights={trained}", "seed=1"]).kill(fewer)


def test_training_of_a_head(scenario, trained, fewer):
    sizes = ["size=32", "objects.size=32", "objects.count=4", "prompts.min_area=8", "prompts.objects=2"]
    words = ["train-head", "head_promptable_scenes", f"weights={trained}", *sizes, "head.hidden=32"]
    often = ["run.checkpoint_every=2", "run.log_every=1", "device=cpu"]
    scenario([*words, *often, "steps=6", "batch=2", "out=head"]).kill(fewer)


def test_extraction(scenario, trained, photos, fewer):
    words = ["extract", f"weights={trained}", f"data.path={photos}", "tokens=cls,patch", "shard=5", "batch=3"]
    scenario([*words, "out=features", "workers=1"]).kill(fewer)


def test_linear_evaluation_and_its_labels_for_images(scenario, trained, photos, fewer):
    folders = [f"{role}.{key}" for role in ("train", "test") for key in (f"path={photos}", "labels=folders")]
    training = ["steps=30", "step_batch=8", "save_every=5", "lr=[0.1]", "blocks=[1,2]", "overlap=allow"]
    linear = ["eval", "linear", f"weights={trained}", *folders, *training, "workers=0", "out=results"]
    predict = [
        "predict",
        f"weights={trained}",
        "head=results/linear",
        f"data.path={photos}",
        "out=labels.csv",
    ]
    scenario(linear, [*predict, "workers=1"]).kill(fewer)


def test_curation(scenario, trained, photos, fewer):
    words = ["curate", "curate_small", f"weights={trained}", f"pool.path={photos}", "dedup.similarity=1"]
    scenario([*words, "embed.workers=0", "clusters.count=4", "balance.images=10", "out=curated"]).kill(fewer)


@pytest.mark.parametrize("to", ["dinov2", "timm"])
def test_export(scenario, trained, fewer, to):
    out = "out=official.pth" if to == "dinov2" else "out=folder"
    scenario(["export", f"weights={trained}", f"to={to}", out]).kill(fewer)


def test_report(scenario, trained, fewer):
    scenario(["report", trained, "out=report.html"]).kill(fewer)


def test_sweep_whose_trainings_end_with_it(scenario, recipe, fewer, tmp_path):
    sweep = tmp_path / "sweep.yaml"
    rows = "rows: {base: [], wide: [backbone.width=32]}"
    sweep.write_text(f"recipe: {recipe}\nset: [optim.steps=4]\n{rows}\nout: out\n")
    scenario(["sweep", sweep]).kill(fewer, most=6)
