"""dinokit demo [key=value ...]: train on built-in scenes, evaluate, print tables; takes minutes.

The run is in runs/demo. The keys are those of the recipe scenes_cpu.

dinokit demo
dinokit demo optim.steps=200 run.out=runs/short
"""

from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

from dinokit import evaluation
from dinokit.commands import Command
from dinokit.commands.eval import evaluate_job
from dinokit.commands.train import pretrain
from dinokit.config.load import Recipe, load_recipe

if TYPE_CHECKING:
    from dinokit.models import Backbone

LIST = "eval_scenes"
SHOWN = {
    "linear": "top1",
    "knn": "top1@20",
    "logreg": "top1",
    "retrieval": "mAP",
    "segmentation": "mIoU",
    "depth": "rmse",
    "video": "J&F mean",
}
# What stands against the features: another method without them, or the same one on pixels.
INSTEAD = {"segmentation": {"method": "majority"}, "depth": {"method": "mean"}}
PATCHES = "video"  # its baseline is the pixels of each patch: the other pixels have no places
PIXELS = {"blocks": [1], "pool": [False]}


def run(command: Command) -> None:
    command.no_words(" The demo has a recipe of its own; another one: dinokit train RECIPE.")
    recipe = load_recipe("scenes_cpu", ["run.out=runs/demo", *command.settings])
    if "knn" not in recipe.evals:
        raise ValueError("dinokit demo needs evals.knn.")
    from dinokit.runtime.signals import stop_signals

    with stop_signals(between_items=True):  # around both: a signal at the last step also ends the evaluation
        _evaluate(recipe, pretrain(recipe))


def _evaluate(recipe: Recipe, out: str) -> None:
    """What the run knows, against pixels and the untrained network."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from dinokit.train.student_teacher import build_backbone

    torch.manual_seed(recipe.run.seed)
    trained = evaluation.load_evaluated(out, None, recipe.run.device)
    place = next(trained.parameters()).device
    pixels = {"name": "pixels", "size": recipe.crops.globals.size}
    backbones = {
        "raw pixels, 16 x 16": evaluation.load_evaluated(None, pixels, recipe.run.device),
        "the same ViT, untrained": build_backbone(recipe).to(place).eval(),
        "your DINOv2": trained,
    }
    table = Table(
        "features",
        "k-NN top-1 (k=20)",
        title="Built-in scenes: ten shapes, test images never seen in training",
    )
    values = {key: value for key, value in recipe.evals["knn"].items() if key != "every"}
    values = evaluation.with_data("knn", values, recipe.data)
    for label, backbone in backbones.items():
        table.add_row(label, f"{100 * evaluation.run_evaluator('knn', values, backbone)['top1@20']:.1f} %")
    Console().print(table)
    patches = {"name": "raw_patches", "size": recipe.crops.globals.size, "patch": trained.patch,
               "cell": gcd(4, trained.patch)}  # fmt: skip
    instead = backbones["raw pixels, 16 x 16"], evaluation.load_evaluated(None, patches, recipe.run.device)
    _evaluate_all(Path(out), trained, *instead)
    print(f"Weights: {out}/teacher.safetensors   curves: {out}/metrics.jsonl   recipe: {out}/recipe.yaml")
    print("Now your own: dinokit train small_photos data.path=PHOTOS run.out=runs/photos")


def _evaluate_all(out: Path, trained: "Backbone", pixels: "Backbone", patches: "Backbone") -> None:
    """Every evaluator on the trained backbone and on a baseline; results go to the run, as of `eval all`."""
    from rich.console import Console
    from rich.table import Table

    table = Table("evaluator", "score", "your DINOv2", "baseline", "", title="All evaluators")
    about = {**evaluation.describe_evaluated(str(out), trained), "eval_recipe": LIST}
    for each, base in zip(evaluation.read_list(LIST, {}), evaluation.read_list(LIST, {}), strict=True):
        score = SHOWN[each.name]
        ours = evaluate_job(each, trained, str(out), about, out, True)[score]
        change = INSTEAD.get(each.name, {key: v for key, v in PIXELS.items() if key in base.values})
        base = replace(base, values={**base.values, **change})
        against = patches if each.name == PATCHES else pixels
        theirs = evaluate_job(base, against, "pixels", {}, None, True)[score]
        what = " ".join(str(value) for value in INSTEAD.get(each.name, {}).values()) or "raw pixels"
        table.add_row(each.name, score, f"{ours:.3f}", f"{theirs:.3f}", what)
    Console().print(table)
    print("RMSE is in metres, and less is better. All scores: dinokit results " + str(out))
