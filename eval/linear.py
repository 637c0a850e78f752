"""Linear classifiers on frozen features: the grid of DINOv2 (arXiv 2304.07193, appendix B.3), all at once.

Every head of the grid sees the class tokens of the last one or four blocks, with or without the mean of the
last block's patches, and learns at its own rate; the one that is best on images held out of the training set
is the one that is judged. The defaults are the published ones, but for the held-out images: published figures
chose the head on the test images (select=test), which flatters, so such a score is called optimistic.

mode=online cuts and colours nothing in advance: every image is cut at random each time, as published.
mode=cached sees `views` random cuts of an image, or its centre alone, once, and trains on these features.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if
from dinokit.data.transforms import RandomResizedCrop
from dinokit.eval._heads import Head, Heads
from dinokit.eval._labelled import tell_unreadable
from dinokit.eval._resume import Resume, identity
from dinokit.eval._scores import mean_average_precision
from dinokit.eval._stream import Order, cached_batches, online_batches
from dinokit.eval._task import Task, split
from dinokit.eval._truth import kept_places
from dinokit.features import Pooling, Subset, device_of
from dinokit.features.fingerprint import images_stamp
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import all_reduce_max, rank
from dinokit.runtime.files import atomic
from dinokit.runtime.log import info, watch

ROWS = 4096  # features judged at a time
LARGER = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # rates to try where the largest is the best
HUB = {(1, True): "linear_head.pth", (4, True): "linear4_head.pth"}  # the inputs of the released classifiers


@dataclass
class Config:
    train: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "train"}
    )
    test: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources", "split": "test"})
    # Further test sets by name; their classes are some of the training set's.
    also: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "test", "many": True}
    )
    maps: dict[str, str] = field(
        default_factory=dict
    )  # of these sets: a file, where their classes have other names
    mode: Literal["cached", "online"] = "cached"  # features once, or of a new random cut every time
    views: int = only_if(0, mode=("cached",))  # random cuts of a training image; 0: its centre
    blocks: tuple[int, ...] = (1, 4)  # class tokens of so many last blocks
    pool: tuple[bool, ...] = (False, True)  # beside them, the mean of the last block's patches
    lr: tuple[float, ...] = (
        1e-5,
        2e-5,
        5e-5,
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        1e-2,
        2e-2,
        5e-2,
        1e-1,
    )  # of a head, for a batch of 256
    steps: int = 12_500  # of SGD; the rate falls to 0 along a cosine
    step_batch: int = 1024  # images a step, over all processes
    momentum: float = 0.9  # of SGD
    select: Literal["train", "test"] = "train"  # where the best head is chosen: held out of train, or on test
    held_out: float = only_if(0.1, select=("train",))  # share of the training images
    seed: int = 0
    labels: str = ""  # JSON, {image: [class, ...]}: images may have several classes, and mAP is the score
    real: str = ""  # JSON, the classes that are accepted for each test image: ImageNet-ReaL's real.json
    size: int = 0  # pixels; 0: what the backbone was trained on
    resize: int = 0  # pixels of the shorter side before the centre is cut out; 0: 256 / 224 of `size`
    batch: int = 256  # images, for the backbone
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_unreadable: float = 0.01  # share of a set's images that may be unreadable: they are left out
    max_train: int = 0  # images, drawn evenly from the set; 0: all
    max_test: int = 0
    cache: str | None = None  # folder where features are kept for the next evaluator; none: they are not
    out: str | None = None  # folder for the chosen heads and, while it trains, the state to go on from
    save_every: int = 1_250  # steps

    def __post_init__(self) -> None:
        check_at_least(self, blocks=1, steps=1, step_batch=1, batch=1, save_every=1, seed=0)
        check_at_least(self, views=0, lr=0, momentum=0, size=0, resize=0, max_train=0, max_test=0)
        if not (self.blocks and self.pool and self.lr):
            raise ValueError("The grid is empty: give at least one of each of blocks, pool and lr.")
        if self.select == "train" and not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: it must lie between 0 and 1, or set select=test.")
        if self.labels and (self.real or self.also):
            raise ValueError(
                "labels=... gives images several classes; real and also are for one class an image."
            )


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """How often the best head of the grid is right.

    Returns:
        'top1', 'top5' and 'mean_per_class' on the test images, with 'real' if asked for, and the same with
        the name of a further set before them; or 'mAP' if images have several classes. With select=test each
        is followed by '_optimistic'. Then 'held_out', what the head was chosen for; its 'blocks', 'pool' and
        'lr'; 'images_train', 'images_test', and 'images_unreadable' if there are any.

    Raises:
        ValueError, LookupError: if the data cannot be judged; the message names the key to set.
    """
    pool: Literal["mean", "none"] = "mean" if any(cfg.pool) else "none"
    task = Task(cfg, backbone, Pooling(max(cfg.blocks), pool))
    test = task.features("test", task.test)
    y = task.target(task.test, test)
    axes = (sorted(set(axis)) for axis in (cfg.blocks, cfg.pool, cfg.lr))
    heads = Heads(
        [Head(*values) for values in product(*axes)], backbone.width, task.reading.blocks, len(task.classes),
        task.several, cfg.step_batch, cfg.seed, device_of(backbone),
    )  # fmt: skip
    depends_on = identity(asdict(cfg), backbone), images_stamp(task.train)
    resume = Resume(cfg.out, "linear", depends_on, device_of(backbone))
    held, images = _train(cfg, task, heads, resume)
    worth = _worth(heads, *((test.x, y) if held is None else held))
    best = max(worth, key=lambda head: worth[head])
    if worth[best][0] < 0:
        raise ValueError("Every head of the grid diverged: take smaller lr=[...].")
    if best.lr == max(cfg.lr) > min(cfg.lr) and worth[best][0] < 1:
        larger = ",".join(f"{best.lr * times:g}" for times in LARGER)
        info(
            f"The best head has the largest rate, lr={best.lr:g}. Short features, and few steps, want larger "
            f"ones: try lr=[{larger}]."
        )
    if cfg.out and rank() == 0:
        _save(Path(cfg.out).expanduser(), heads, worth)
    scores = task.scores(lambda x: heads.logits_of(best, x), test, y)
    if cfg.select == "test":
        scores = {f"{key}_optimistic": value for key, value in scores.items()}
    else:
        scores["held_out"] = worth[best][0]
    scores |= {"blocks": best.blocks, "pool": int(best.pool), "lr": best.lr}
    scores |= {"images_train": images, "images_test": len(test.x)}
    resume.finish()
    lost = len(task.train) - images + len(test.unreadable)
    return scores | ({"images_unreadable": lost} if lost else {})


def _train(cfg: Config, task: Task, heads: Heads, resume: Resume) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """Train all heads. Returns features and targets of the held-out images, and how many could be read."""
    fit, held = torch.arange(len(task.train)), torch.arange(0)
    if cfg.select == "train":
        fit, held = split(len(task.train), cfg.held_out, cfg.seed)
    device, state = device_of(task.backbone), resume.load()
    lost = torch.zeros(len(task.train), dtype=torch.uint8)  # images that cannot be read
    if state is not None:
        heads.load(state)
        lost.copy_(state["lost"])
    start = done = 0 if state is None else int(state["step"])
    prepare = _cached if cfg.mode == "cached" else _online
    batches, kept = prepare(cfg, task, fit, held, start, lost)

    def learnt() -> dict[str, Any]:
        met = all_reduce_max(lost.to(device)).cpu()  # by any process: the first one writes
        return {"step": done, "lost": met, **heads.state()}

    with resume.kept(learnt):
        for x, y in watch(batches, cfg.steps, f"{len(list(heads.each()))} heads", start, together=True):
            factor = (1 + math.cos(math.pi * done / cfg.steps)) / 2
            heads.step(x, y, cfg.step_batch, cfg.momentum, factor)
            done += 1
            if done % cfg.save_every == 0:
                resume.save(learnt())
    lost = all_reduce_max(lost.to(device)).cpu()
    if cfg.mode == "online":
        names = [task.train.name(i) for i in fit[lost[fit] > 0].tolist()]
        tell_unreadable("train", names, len(fit), cfg.max_unreadable)
    return kept, len(task.train) - int(lost.sum())


Worth = dict[Head, tuple[float, float]]  # what a head is chosen by, and among equals
Batches = Iterator[tuple[Tensor, Tensor]]
Prepared = tuple[Batches, tuple[Tensor, Tensor] | None]  # batches, what is held out


def _cached(cfg: Config, task: Task, fit: Tensor, held: Tensor, start: int, lost: Tensor) -> Prepared:
    """Batches of features that are made once. Writes 1 into `lost` for an image that cannot be read."""
    centre = task.features("train", task.train)
    y = task.target(task.train, centre)
    is_held = torch.zeros(len(task.train), dtype=torch.bool)
    is_held[held] = True
    there = kept_places(task.train, centre)
    is_held = is_held[there]
    lost.fill_(1)[there] = 0
    rows = (~is_held).nonzero().flatten()
    kept = (centre.x[is_held], y[is_held]) if len(held) else None
    views = [centre.x]
    if cfg.views:
        cut = RandomResizedCrop(cfg.size or task.backbone.input.size, cfg.seed)
        views = [task.features("train", task.train, cut, draw).x for draw in range(cfg.views)]
    order = Order(len(rows), cfg.step_batch, cfg.seed)
    return cached_batches(views, y, rows, order, start, cfg.steps), kept


def _online(cfg: Config, task: Task, fit: Tensor, held: Tensor, start: int, lost: Tensor) -> Prepared:
    """Batches of images that are cut and seen anew. As `_cached`, but images are lost as they are met."""
    kept = None
    if len(held):
        part = Subset(task.train, held.tolist())
        done = task.features("train", part)
        kept = done.x, task.target(part, done)
        lost[held] = 1
        lost[held[kept_places(part, done)]] = 0
    device = device_of(task.backbone)
    cut = RandomResizedCrop(cfg.size or task.backbone.input.size, cfg.seed)
    batches = online_batches(
        task.backbone, task.train, fit, cut, task.reading,
        task.target_of(task.train), Order(len(fit), cfg.step_batch, cfg.seed), start, cfg.steps,
        cfg.batch, cfg.workers, DTYPES[pick_precision(cfg.precision, device)], lost,
    )  # fmt: skip
    return batches, kept


def _worth(heads: Heads, x: Tensor, y: Tensor) -> Worth:
    """What each head is chosen by: top-1, or mAP if images have several classes; -1 if it diverged."""
    if y.ndim == 1:
        return heads.right(x, y, ROWS)
    done: Worth = {}
    for head, _, _ in heads.each():  # one at a time: (N, C) logits of all would fill the memory
        logits = heads.logits_of(head, x)
        done[head] = (mean_average_precision(logits, y) if logits.isfinite().all() else -1.0, 0.0)
    return done


def _save(out: Path, heads: Heads, worth: Worth) -> None:
    """The best head on each input that released classifiers have, in their files' layout: weight and bias."""
    for shape, name in HUB.items():
        able = [(worth[head], head) for head in worth if (head.blocks, head.pool) == shape]
        if able:
            best = max(able, key=lambda pair: pair[0])[1]
            weight, bias = next((weight, bias) for head, weight, bias in heads.each() if head == best)
            with atomic(out / name) as part:
                torch.save({"weight": weight.cpu(), "bias": bias.cpu()}, part)
