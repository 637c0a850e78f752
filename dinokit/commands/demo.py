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
from dinokit.commands import Command
from dinokit.commands.eval import evaluate_job
from dinokit.commands.train import pretrain, write_report
from dinokit.config.load import Recipe, load_recipe

if TYPE_CHECKING:
    from dinokit.models import Backbone

LIST = "eval_scenes"
PIXELS = "pixels, averaged to 16 x 16"
SHOWN_QUERIES, SHOWN_GALLERY = 4, 400  # test images in the picture


class Row(NamedTuple):
    """What the table shows of an evaluator."""

    question: str
    score: str
    baseline: str
    change: dict[str, Any]  # of the evaluator's settings, for the baseline


ROWS = {
    "linear": Row("which kind? a linear classifier on the features", "top1", PIXELS,
                  {"blocks": [1], "pool": [False]}),
    "knn": Row("which kind? a vote of the 20 most similar images", "top1@20", PIXELS, {}),
    "logreg": Row("which kind? logistic regression on the features", "top1", PIXELS, {}),
    "retrieval": Row("are the most similar images of the same kind?", "mAP", PIXELS, {}),
    "segmentation": Row("which kind is each pixel? a vote of similar patches", "mIoU",
                        "one class everywhere", {"method": "majority"}),
    "depth": Row("how far is each pixel? a linear map of patches", "rmse",
                 "the mean depth everywhere", {"method": "mean"}),
    "video": Row("where do the objects of the first frame go?", "J&F mean", "pixels of each patch", {}),
}  # fmt: skip
LOWER_IS_BETTER = "rmse"  # in metres; the other scores are shares of 1


def run(command: Command) -> None:
    command.no_words(" The demo has a recipe of its own; another one: dinokit train RECIPE.")
    recipe = load_recipe("scenes_cpu", ["run.out=runs/demo", *command.settings])
    if "knn" not in recipe.evals:
        raise ValueError("dinokit demo needs evals.knn.")
    from dinokit.runtime.signals import stop_signals

    with stop_signals(between_items=True):  # around both: a signal at the last step also ends the evaluation
        begin = time.monotonic()
        print(f"1 of 3: training a small ViT for {recipe.optim.steps} steps, on images without labels")
        out = Path(pretrain(recipe))
        minutes = (time.monotonic() - begin) / 60
        print(f"2 of 3: evaluating it on {len(ROWS)} tasks, beside baselines ({minutes:.1f} minutes so far)")
        backbone = evaluation.load_evaluated(str(out), None, recipe.run.device)
        _evaluate(recipe, out, backbone)
        print(f"3 of 3: drawing {_draw(recipe, out, backbone)}")
        write_report(recipe)
    print(f"Weights: {out}/teacher.safetensors   curves: {out}/metrics.jsonl   recipe: {out}/recipe.yaml")
    print(f"All scores: dinokit results {out}   time: {(time.monotonic() - begin) / 60:.1f} minutes")
    print("Now your own: dinokit train data.path=PHOTOS minutes=60")


def _evaluate(recipe: Recipe, out: Path, trained: "Backbone") -> None:
    """Every evaluator on the trained backbone and its baseline; results go to the run, as of `eval all`."""
    from rich.console import Console
    from rich.table import Table

    untrained = _untrained_knn(recipe, trained)
    size, device = trained.input.size, recipe.run.device
    pixels = evaluation.load_evaluated(None, {"name": "pixels", "size": size}, device)
    # The other pixels have no places, which video needs.
    patches = {"name": "raw_patches", "size": size, "patch": trained.patch, "cell": gcd(4, trained.patch)}
    title = "Built-in scenes: ten kinds of objects, test images never seen in training"
    table = Table("evaluator", "question", "score", "your network", "baseline", "", title=title)
    about = {**evaluation.describe_evaluated(str(out), trained), "eval_recipe": LIST}
    for job, base in zip(evaluation.read_list(LIST, {}), evaluation.read_list(LIST, {}), strict=True):
        begin, row = time.monotonic(), ROWS[job.name]
        score = evaluate_job(job, trained, str(out), about, out, True)[row.score]
        against = evaluation.load_evaluated(None, patches, device) if job.name == "video" else pixels
        base = replace(base, values={**base.values, **row.change})
        baseline = evaluate_job(base, against, "pixels", {}, None, True)[row.score]
        ours, theirs = _shown(row.score, score), _shown(row.score, baseline)
        table.add_row(job.name, row.question, row.score, ours, theirs, row.baseline)
        if job.name == "knn":
            table.add_row("", "", "", "", _shown(row.score, untrained), "the same ViT, untrained")
        seconds = time.monotonic() - begin
        print(f"  {job.name}: {ours}, {row.baseline} {theirs}  ({seconds:.0f} s)", flush=True)
    Console().print(table)


def _untrained_knn(recipe: Recipe, trained: "Backbone") -> float:
    import torch

    from dinokit.features import device_of
    from dinokit.train.student_teacher import build_backbone

    torch.manual_seed(recipe.run.seed)
    untrained = build_backbone(recipe).to(device_of(trained)).eval()
    return evaluation.run_evaluator("knn", _knn_settings(), untrained)["top1@20"]


def _knn_settings() -> dict[str, Any]:
    return next(job.values for job in evaluation.read_list(LIST, {}) if job.name == "knn")


def _shown(score: str, value: float) -> str:
    return f"{value:.2f} m (less is better)" if score == LOWER_IS_BETTER else f"{100 * value:.1f} %"


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
        "What training sees: large crops, the same with hidden patches, small crops": viz.crops(
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
