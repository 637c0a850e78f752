"""Multinomial logistic regression on frozen features: the small-data protocol of DINOv2 (arXiv 2304.07193).

    min over W, b:   C * sum over images of the cross-entropy + |W|^2 / 2       (b is not penalised)

The objective is scikit-learn's, in float64, minimised by L-BFGS. C is chosen on images held out of the
training set (or those of `select_on`), from the strongest penalty to the weakest; each solution starts from
the previous one. The regression with the chosen C is then solved on all training images. Features are class
tokens, not normalised.

    N  images     D  width     K  classes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.sources import images_stamp
from dinokit.eval import ClassificationConfig
from dinokit.eval._images import (
    count_shared,
    image_features,
    named_optimistic,
    open_source,
    partial_result,
    save_classifier,
    shared_classes,
    split_images,
)
from dinokit.eval._metrics import class_scores
from dinokit.features import Features, Pooling
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch
from dinokit.runtime.partial import PartialResult


@dataclass
class Config(ClassificationConfig):
    resize: int = 0  # pixels of the shorter side before the centre crop; 0: `size`, as published
    # Images to choose C on; none: some of the training images.
    select_on: dict[str, Any] | None = source_field("data.sources", "test", optional=True)
    powers: tuple[float, float] = (-6, 5)  # C goes from 10 to the first of these powers to 10 to the second
    count: int = 45  # values of C
    select: Literal["train", "test"] = "train"  # where C is chosen: on test it flatters: called optimistic
    held_out: float = only_if(0.1, select=("train",), select_on=False)  # share of the training images
    seed: int = 0
    iterations: int = 1000  # of L-BFGS, at most
    tolerance: float = 1e-7  # of the objective per image: largest slope at which it stops
    out: str | None = None  # folder for the classifier, and the results of each C: a stopped search resumes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, count=1, seed=0, iterations=1, tolerance=0)
        if self.powers[0] > self.powers[1]:
            raise ValueError(f"powers={list(self.powers)}: the smaller comes first.")
        if self.select == "test" and self.select_on:
            raise ValueError("select=test chooses C on the test images; take out select_on.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Accuracy of the regression with the best C.

    Returns:
        'top1', 'top5' if there are more than five classes, and 'mean_per_class', with select=test each
        followed by '_optimistic'; 'held_out', top-1 where C was chosen; 'C'; 'images_train', 'images_test',
        and 'images_unreadable' if there are any.

    Raises:
        ValueError, LookupError: if the data do not fit; the message names the key to set.
    """
    train_source = open_source(cfg.train, "train", backbone, cfg.max_train)
    test_source = open_source(cfg.test, "test", backbone, cfg.max_test)
    classes = len(shared_classes(train_source, test_source))
    shared = count_shared(cfg, train_source, test_source)
    cfg = replace(cfg, resize=cfg.resize or cfg.size or backbone.input.size)
    train = _to_float64(image_features(cfg, "train", backbone, train_source))
    test = _to_float64(image_features(cfg, "test", backbone, test_source))
    fit, choose = train, test  # images to solve each C on, and to choose C on
    sources = [train_source, *([test_source] if cfg.select == "test" else [])]
    if cfg.select_on:
        other = open_source(cfg.select_on, "select_on", backbone)
        shared_classes(train_source, other)
        shared += count_shared(cfg, other, test_source, train_key="select_on")
        choose = _to_float64(image_features(cfg, "select_on", backbone, other))
        sources.append(other)
        train = Features(torch.cat([train.x, choose.x]), torch.cat([train.y, choose.y]), train.unreadable)
    elif cfg.select == "train":
        split = (rows.to(train.y.device) for rows in split_images(len(train.y), cfg.held_out, cfg.seed))
        fit, choose = (Features(train.x[rows], train.y[rows], []) for rows in split)
    grid = torch.logspace(*cfg.powers, cfg.count, dtype=torch.float64).tolist()
    partial = partial_result(cfg, "logreg", backbone, [images_stamp(each) for each in sources])
    partial.device = train.x.device
    accuracy = _accuracy_by_c(cfg, grid, fit, choose, classes, partial)
    best = max(range(len(grid)), key=lambda i: accuracy[i])  # of equals the strongest penalty
    weight, bias = solve(train.x, train.y, classes, grid[best], cfg.iterations, cfg.tolerance)
    partial.remove()
    if cfg.out and rank() == 0:
        save_classifier(cfg, backbone, weight, bias, train_source.classes, Pooling())
    scores = class_scores(test.x @ weight.T + bias, test.y)
    scores = named_optimistic(scores, shared, cfg.select == "test")
    scores |= {"held_out": accuracy[best]} if cfg.select == "train" else {}
    scores |= {"C": grid[best], "images_train": len(train.y), "images_test": len(test.y)}
    unreadable = len(train.unreadable) + len(test.unreadable)
    return scores | ({"images_unreadable": unreadable} if unreadable else {})


def _accuracy_by_c(
    cfg: Config, grid: Sequence[float], fit: Features, choose: Features, classes: int, partial: PartialResult
) -> list[float]:
    """Top-1 on `choose` for each C. In each round every process solves one."""
    world, finished = world_size(), 0
    accuracy = choose.x.new_zeros(len(grid))
    last = fit.x.new_zeros(world, classes, fit.x.shape[1] + 1)  # each process's weight and bias
    if (state := partial.load()) is not None:
        finished = int(state["finished"])
        accuracy.copy_(state["accuracy"])
        last.copy_(state["last"] if len(state["last"]) == world else state["last"][-1])
    rounds = math.ceil(len(grid) / world)
    for first in watch(range(finished, len(grid), world), rounds, "C", finished // world, together=True):
        i, new_accuracy, new_last = first + rank(), torch.zeros_like(accuracy), torch.zeros_like(last)
        if i < len(grid):
            start = last[rank(), :, :-1], last[rank(), :, -1]
            weight, bias = solve(fit.x, fit.y, classes, grid[i], cfg.iterations, cfg.tolerance, start)
            new_accuracy[i] = class_scores(choose.x @ weight.T + bias, choose.y)["top1"]
            new_last[rank()] = torch.cat([weight, bias[:, None]], dim=1)
        accuracy, last = accuracy + all_reduce_sum(new_accuracy), all_reduce_sum(new_last)
        partial.save({"finished": first + world, "accuracy": accuracy, "last": last})
    return accuracy.tolist()


def solve(
    x: Tensor, y: Tensor, classes: int, c: float, iterations: int, tolerance: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The minimum of the objective above.

    Args:
        x: (N, D) float64.
        y: (N,) int64, in [0, classes).
        classes: K.
        c: C.
        iterations: of L-BFGS, at most.
        tolerance: of the objective over C * N: largest slope at which it stops.
        start: initial weight and bias; zeros if none.

    Returns:
        Weight (K, D) and bias (K,).
    """
    # With centred features the bias and the weights are nearly independent: fewer steps are needed.
    mean = x.mean(dim=0)
    x = x - mean
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), (bias + weight @ mean).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2 * c * len(y))
        value.backward()
        return value

    solver.step(objective)
    weight, bias = weight.detach(), bias.detach()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(
            f"The regression with C={c:g} did not stay finite: lower the second of powers=[...]."
        )
    return weight, bias - weight @ mean


def _to_float64(features: Features) -> Features:
    device = "cpu" if features.x.device.type == "mps" else features.x.device  # Apple's GPUs have no float64
    return Features(features.x.to(device).double(), features.y.to(device), features.unreadable)
