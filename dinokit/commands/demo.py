"""dinokit demo [key=value ...]: train on built-in scenes, evaluate, draw a picture; takes minutes.

The run is in runs/demo. The keys are those of the recipe scenes_cpu.

dinokit demo
dinokit demo optim.steps=200 run.out=runs/short
"""

import time
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dinokit import evaluation
from dinokit.commands import RECIPE_KEYS, Command
from dinokit.commands.eval import evaluate_job
from dinokit.commands.train import pretrain, result_of, write_report
from dinokit.config.load import Recipe, load_recipe

if TYPE_CHECKING:
    from dinokit.models import Backbone

SHORT = RECIPE_KEYS
LIST = "eval_scenes"
SHOWN_QUERIES, SHOWN_GALLERY = 4, 400  # test images in the picture


class Row(NamedTuple):
    """What the table shows of an evaluator."""

    task: str
    score: str
    baseline: str
    change: dict[str, Any]  # of the evaluator's settings, for the baseline


ROWS = {
    "linear": Row("kind, by a linear classifier", "top1", "pixels", {"blocks": [1], "pool": [False]}),
    "knn": Row("kind, by the 20 nearest images", "top1@20", "pixels", {}),
    "logreg": Row("kind, by logistic regression", "top1", "pixels", {}),
    "retrieval": Row("images of the same kind (mAP)", "mAP", "pixels", {}),
    "segmentation": Row("kind of each pixel (mIoU)", "mIoU", "one class", {"method": "majority"}),
    "depth": Row("error of depth (RMSE): less is better", "rmse", "mean depth", {"method": "mean"}),
    "video": Row("objects followed in a clip (J&F)", "J&F mean", "pixels", {}),
}
LOWER_IS_BETTER = "rmse"  # in metres; the other scores are shares of 1


def run(command: Command) -> dict[str, Any]:
    command.no_words(" The demo has a recipe of its own; another one: dinokit train RECIPE.")
    recipe = load_recipe("scenes_cpu", ["run.out=runs/demo", *command.settings])
    if "knn" not in recipe.evals:
        raise ValueError("dinokit demo needs evals.knn.")
    from dinokit.runtime.signals import stop_signals

    with stop_signals(between_items=True):  # around both: a signal at the last step also ends the evaluation
        begin = time.monotonic()
        print(f"1 of 3: training a small ViT for {recipe.optim.steps} steps, on images without labels")
        pretrain(recipe)
        out = Path(recipe.run.out)
        minutes = (time.monotonic() - begin) / 60
        print(f"2 of 3: evaluating it on {len(ROWS)} tasks, beside baselines ({minutes:.1f} minutes so far)")
        backbone = evaluation.load_evaluated(str(out), None, recipe.run.device)
        _evaluate(recipe, out, backbone)
        print(f"3 of 3: drawing {_draw(recipe, out, backbone)}")
        write_report(recipe)
    print(f"Weights: {out}/teacher.safetensors   curves: {out}/metrics.jsonl   recipe: {out}/recipe.yaml")
    print(f"All scores: dinokit results {out}   time: {(time.monotonic() - begin) / 60:.1f} minutes")
    print("Now your own: dinokit train data.path=PHOTOS minutes=60")
    return result_of(recipe)


def _evaluate(recipe: Recipe, out: Path, trained: "Backbone") -> None:
    """Every evaluator on the trained backbone and its baseline; results go to the run, as of `eval all`."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    untrained = _untrained_knn(recipe, trained)
    size, device = trained.input.size, recipe.run.device
    pixels = evaluation.load_evaluated(None, {"name": "pixels", "size": size}, device)
    # The backbone `pixels` gives no feature map, which video needs.
    patches = {"name": "raw_patches", "size": size, "patch": trained.patch, "cell": gcd(4, trained.patch)}
    table = Table("evaluator", "what it measures", "your network", "baseline", box=SIMPLE)
    table.title = "Built-in scenes: ten kinds of objects, test images never seen in training"
    about = {**evaluation.describe_evaluated(str(out), trained), "eval_recipe": LIST}
    for job, base in zip(evaluation.read_list(LIST, {}), evaluation.read_list(LIST, {}), strict=True):
        begin, row = time.monotonic(), ROWS[job.name]
        score = evaluate_job(job, trained, str(out), about, out, True)[row.score]
        against = evaluation.load_evaluated(None, patches, device) if job.name == "video" else pixels
        base = replace(base, values={**base.values, **row.change})
        baseline = evaluate_job(base, against, "pixels", {}, None, True)[row.score]
        ours, theirs = _shown(row.score, score), _shown(row.score, baseline)
        table.add_row(job.name, row.task, ours, f"{theirs}, {row.baseline}")
        if job.name == "knn":
            table.add_row("", "", "", f"{_shown(row.score, untrained)}, untrained network")
        seconds = time.monotonic() - begin
        print(f"  {job.name}: {ours}, {row.baseline} {theirs}  ({seconds:.0f} s)", flush=True)
    Console().print(table)


def _untrained_knn(recipe: Recipe, trained: "Backbone") -> float:
    import torch

    from dinokit.features import device_of
    from dinokit.train.networks import build_backbone

    torch.manual_seed(recipe.run.seed)
    untrained = build_backbone(recipe).to(device_of(trained)).eval()
    return evaluation.run_evaluator("knn", _knn_settings(), untrained)["top1@20"]


def _knn_settings() -> dict[str, Any]:
    return next(job.values for job in evaluation.read_list(LIST, {}) if job.name == "knn")


def _shown(score: str, value: float) -> str:
    return f"{value:.2f} m" if score == LOWER_IS_BETTER else f"{100 * value:.1f} %"


def _draw(recipe: Recipe, out: Path, backbone: "Backbone") -> Path:
    """A picture of crops, of patch features and of nearest neighbours. Returns its path."""
    import numpy as np
    import torch

    from dinokit import viz
    from dinokit.config import registry
    from dinokit.features import device_of, frozen, normalised

    source = registry.build("data.sources", _knn_settings()["test"])
    count = min(SHOWN_GALLERY, len(source))
    read = [source[index] for index in range(count)]
    images = np.stack([np.asarray(image) for image, _ in read])
    x = normalised(backbone, torch.from_numpy(images).movedim(3, 1).to(device_of(backbone)))
    with frozen(backbone), torch.inference_mode():
        features = torch.cat([backbone([part], [None])[0].cls for part in x.split(100)]).cpu()
    queries = [index * count // SHOWN_QUERIES + index for index in range(SHOWN_QUERIES)]
    panels = {
        "What training sees: crops in changed colours, and the same with hidden patches": viz.crops(
            recipe, registry.build("data.sources", recipe.data)
        ),
        "Ten test images": viz.grid([list(images[:10])]),
        "Their patches: similar features have similar colours (first three principal components)": viz.grid(
            [viz.pca(backbone, [image for image, _ in read[:10]])]
        ),
        "Test images, and those with the most similar features (green: the same kind)": viz.neighbours(
            images, features, queries, k=9, labels=[label for _, label in read]
        ),
    }
    viz.figure(panels, out / "demo.png")
    return out / "demo.png"
