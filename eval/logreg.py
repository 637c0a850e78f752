"""Multinomial logistic regression on frozen features: the small-data protocol of DINOv2 (arXiv 2304.07193).

    min over W, b:   C * sum over images of the cross-entropy + |W|^2 / 2       (b is not penalised)

scikit-learn's objective, in float64, solved by L-BFGS. Solutions are found from the strongest penalty to the
weakest, each from the last. C is chosen on images held out of the training set (or those of `select_on`), and
the one chosen is solved again on all of them. Features are class tokens at their own length.

    N  images     D  width     K  classes
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if
from dinokit.eval._labelled import features_of, open_source, refuse_overlap, shared_classes
from dinokit.eval._resume import Resume, identity
from dinokit.eval._scores import class_scores
from dinokit.eval._task import split
from dinokit.features import Features, Pooling
from dinokit.features.fingerprint import images_stamp
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch


@dataclass
class Config:
    train: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "train"}
    )
    test: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources", "split": "test"})
    # Images to choose C on; none: some of the training images.
    select_on: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "test", "optional": True}
    )
    powers: tuple[float, float] = (-6, 5)  # C goes from 10 to the first of these powers to 10 to the second
    count: int = 45  # values of C
    select: Literal["train", "test"] = "train"  # where C is chosen: test flatters, and is called optimistic
    held_out: float = only_if(0.1, select=("train",), select_on=False)  # share of the training images
    seed: int = 0
    iterations: int = 1000  # of L-BFGS, at most
    tolerance: float = 1e-7  # of the objective per image: largest slope at which it stops
    size: int = 0  # pixels; 0: what the backbone was trained on
    resize: int = 0  # pixels of the shorter side before the centre is cut out; 0: `size`, as published
    batch: int = 256  # images, for the backbone
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_unreadable: float = 0.01  # share of a set's images that may be unreadable: they are left out
    max_train: int = 0  # images, drawn evenly from the set; 0: all
    max_test: int = 0
    cache: str | None = None  # folder where features are kept for the next evaluator; none: they are not
    out: str | None = None  # folder for what was found of each C, to go on from until all were tried

    def __post_init__(self) -> None:
        check_at_least(self, count=1, seed=0, iterations=1, tolerance=0, size=0, resize=0, batch=1)
        check_at_least(self, max_train=0, max_test=0)
        if self.powers[0] > self.powers[1]:
            raise ValueError(f"powers={list(self.powers)}: the smaller comes first.")
        if self.select == "test" and self.select_on:
            raise ValueError("select=test chooses C on the test images; take out select_on.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """How often the regression with the best C is right.

    Returns:
        'top1', 'top5' if there are more than five classes, and 'mean_per_class', with select=test each
        followed by '_optimistic'; 'held_out', top-1 where C was chosen; 'C'; 'images_train', 'images_test',
        and 'images_unreadable' if there are any.

    Raises:
        ValueError, LookupError: if the data cannot be judged; the message names the key to set.
    """
    refuse_overlap(cfg.train, cfg.test)
    refuse_overlap(cfg.select_on, cfg.test)
    train_source = open_source(cfg.train, "train", backbone, cfg.max_train)
    test_source = open_source(cfg.test, "test", backbone, cfg.max_test)
    classes = len(shared_classes(train_source, test_source))
    cfg = replace(cfg, resize=cfg.resize or cfg.size or backbone.input.size)
    train = _as_double(features_of(cfg, "train", backbone, train_source, Pooling()))
    test = _as_double(features_of(cfg, "test", backbone, test_source, Pooling()))
    fit, judge = train, test
    sources = [train_source, *([test_source] if cfg.select == "test" else [])]
    if cfg.select_on:
        other = open_source(cfg.select_on, "select_on", backbone)
        shared_classes(train_source, other)
        judge = _as_double(features_of(cfg, "select_on", backbone, other, Pooling()))
        sources.append(other)
        train = Features(torch.cat([train.x, judge.x]), torch.cat([train.y, judge.y]), train.unreadable)
    elif cfg.select == "train":
        kept, held = (part.to(train.y.device) for part in split(len(train.y), cfg.held_out, cfg.seed))
        fit, judge = (Features(train.x[part], train.y[part], []) for part in (kept, held))
    grid = torch.logspace(*cfg.powers, cfg.count, dtype=torch.float64).tolist()
    depends_on = identity(asdict(cfg), backbone), [images_stamp(each) for each in sources]
    resume = Resume(cfg.out, "logreg", depends_on, train.x.device)
    worth = _worth(cfg, grid, fit, judge, classes, resume)
    best = max(range(len(grid)), key=lambda i: worth[i])  # of equals the strongest penalty
    weight, bias = solve(train.x, train.y, classes, grid[best], cfg.iterations, cfg.tolerance)
    resume.finish()
    scores = class_scores(test.x @ weight.T + bias, test.y)
    if cfg.select == "test":
        scores = {f"{key}_optimistic": value for key, value in scores.items()}
    scores |= {"held_out": worth[best]} if cfg.select == "train" else {}
    scores |= {"C": grid[best], "images_train": len(train.y), "images_test": len(test.y)}
    lost = len(train.unreadable) + len(test.unreadable)
    return scores | ({"images_unreadable": lost} if lost else {})


def _worth(
    cfg: Config, grid: Sequence[float], fit: Features, judge: Features, classes: int, resume: Resume
) -> list[float]:
    """Top-1 for each C. Each process solves a share of them, one a turn."""
    world, done = world_size(), 0
    worth = judge.x.new_zeros(len(grid))
    last = fit.x.new_zeros(world, classes, fit.x.shape[1] + 1)  # each process's weight and bias
    if (state := resume.load()) is not None:
        done = int(state["done"])
        worth.copy_(state["worth"])
        last.copy_(state["last"] if len(state["last"]) == world else state["last"][-1])
    turns = math.ceil(len(grid) / world)
    for first in watch(range(done, len(grid), world), turns, "C", done // world, together=True):
        i, new = first + rank(), torch.zeros_like(worth)
        ours = torch.zeros_like(last)
        if i < len(grid):
            start = last[rank(), :, :-1], last[rank(), :, -1]
            found = solve(fit.x, fit.y, classes, grid[i], cfg.iterations, cfg.tolerance, start)
            new[i] = class_scores(judge.x @ found[0].T + found[1], judge.y)["top1"]
            ours[rank()] = torch.cat([found[0], found[1][:, None]], dim=1)
        worth, last = worth + all_reduce_sum(new), all_reduce_sum(ours)
        resume.save({"done": first + world, "worth": worth, "last": last})
    return worth.tolist()


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
        start: weight and bias to begin at; zeros if none.

    Returns:
        Weight (K, D) and bias (K,).
    """
    # In centred coordinates the bias and the weights hardly pull at each other, and fewer steps are needed.
    middle = x.mean(dim=0)
    x = x - middle
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), (bias + weight @ middle).requires_grad_()
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
    return weight, bias - weight @ middle


def _as_double(features: Features) -> Features:
    device = "cpu" if features.x.device.type == "mps" else features.x.device  # Apple's GPUs have no float64
    return Features(features.x.to(device).double(), features.y.to(device), features.unreadable)
