"""Linear classifiers on frozen features: the grid of DINOv2 (arXiv 2304.07193, appendix B.3).

All heads of the grid train together. Each sees the class tokens of the last one or four blocks, with or
without the mean of the last block's patches, and learns at its own rate. The head that is best on images held
out of the training set is evaluated on the test images. The defaults are the published ones, but for the
held-out images: the published figures chose the head on the test images (select=test), which is optimistic,
and such scores are named so.

mode=online crops every image at random each time, as published. mode=cached computes features of `views`
random crops of an image, or of its centre crop, once, and trains on them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.loader import image_loader
from dinokit.data.sources import ImageSource, images_stamp
from dinokit.data.transforms import RandomResizedCrop, Transform
from dinokit.eval import ClassificationConfig
from dinokit.eval._images import (
    class_map,
    classes_in,
    count_shared,
    image_features,
    multi_hot,
    named_optimistic,
    open_source,
    partial_result,
    read_json,
    readable_images,
    report_unreadable,
    save_classifier,
    shared_classes,
    split_images,
)
from dinokit.eval._linear_grid import Head, ImageOrder, LinearGrid, cached_batches
from dinokit.eval._metrics import accepted_share, class_scores, mean_average_precision
from dinokit.features import Features, Pooling, Subset, device_of, frozen, normalised
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import all_reduce_max, rank
from dinokit.runtime.files import atomic
from dinokit.runtime.log import info, watch
from dinokit.runtime.partial import PartialResult

ROWS = 4096  # rows of features evaluated at a time
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
LARGER = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # rates to try where the largest is the best
HUB = {(1, True): "linear_head.pth", (4, True): "linear4_head.pth"}  # inputs of the released classifiers

Quality = dict[Head, tuple[float, float]]  # what a head is chosen by, and what decides between equal ones
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class Config(ClassificationConfig):
    # Further test sets by name; their classes are some of the training set's.
    also: dict[str, Any] | None = source_field("data.sources", "test", many=True)
    # Of these sets: a file that maps classes, where their classes have other names.
    maps: dict[str, str] = field(default_factory=dict)
    mode: Literal["cached", "online"] = "cached"  # features once, or of a new random crop every time
    views: int = only_if(0, mode=("cached",))  # random crops of a training image; 0: its centre
    blocks: tuple[int, ...] = (1, 4)  # class tokens of this many last blocks
    pool: tuple[bool, ...] = (False, True)  # whether the mean of the last block's patches is added
    lr: tuple[float, ...] = RATES  # of a head, for a batch of 256
    steps: int = 12_500  # of SGD; the rate falls to 0 along a cosine
    step_batch: int = 1024  # images a step, over all processes
    momentum: float = 0.9  # of SGD
    select: Literal["train", "test"] = "train"  # where the best head is chosen: held out of train, or on test
    held_out: float = only_if(0.1, select=("train",))  # share of the training images
    seed: int = 0
    labels: str = ""  # JSON, {image: [class, ...]}: images may have several classes, and mAP is the score
    real: str = ""  # JSON, the classes that are accepted for each test image: ImageNet-ReaL's real.json
    out: str | None = None  # folder for the chosen heads, and for an unfinished training, which resumes
    save_every: int = 1_250  # steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, blocks=1, steps=1, step_batch=1, save_every=1, seed=0, views=0, lr=0, momentum=0)
        if not (self.blocks and self.pool and self.lr):
            raise ValueError("The grid is empty: give at least one of each of blocks, pool and lr.")
        if self.select == "train" and not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: it must lie between 0 and 1, or set select=test.")
        if self.labels and (self.real or self.also):
            raise ValueError(
                "labels=... gives images several classes; real and also are for one class an image."
            )


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Accuracy of the best head of the grid.

    Returns:
        'top1', 'top5' and 'mean_per_class' on the test images, with 'real' if asked for, and the same with
        the name of a further set before them; or 'mAP' if images have several classes. With select=test each
        is followed by '_optimistic'. Then 'held_out', the score that the head was chosen by; its 'blocks',
        'pool' and 'lr'; 'images_train', 'images_test', and 'images_unreadable' if there are any.

    Raises:
        ValueError, LookupError: if the data do not fit; the message names the key to set.
    """
    pooling = Pooling(max(cfg.blocks), "mean" if any(cfg.pool) else "none")
    task = Task(cfg, backbone, pooling)
    test = task.features("test", task.test)
    y = task.targets(task.test, test)
    axes = sorted(set(cfg.blocks)), sorted(set(cfg.pool)), sorted(set(cfg.lr))
    grid = LinearGrid(
        [Head(blocks, pool, lr) for blocks, pool, lr in product(*axes)], backbone.width,
        task.pooling.blocks, len(task.classes), task.multi_label, cfg.step_batch, cfg.seed,
        device_of(backbone),
    )  # fmt: skip
    partial = partial_result(cfg, "linear", backbone, images_stamp(task.train))
    held_out, images = _train(cfg, task, grid, partial)
    quality = _quality(grid, *((test.x, y) if held_out is None else held_out))
    best = max(quality, key=lambda head: quality[head])
    _check_best(cfg, best, quality[best][0])
    if cfg.out and rank() == 0:
        _save_heads(Path(cfg.out).expanduser(), grid, quality)
        weight, bias = grid.tensors_of(best)
        pooling = Pooling(best.blocks, "mean" if best.pool else "none")
        save_classifier(cfg, backbone, weight, bias, task.classes, pooling, task.multi_label)
    scores = task.scores(lambda x: grid.logits_of(best, x), test, y)
    scores = named_optimistic(scores, task.shared, cfg.select == "test")
    if cfg.select == "train":
        scores["held_out"] = quality[best][0]
    scores |= {"blocks": best.blocks, "pool": int(best.pool), "lr": best.lr}
    scores |= {"images_train": images, "images_test": len(test.x)}
    partial.remove()
    unreadable = len(task.train) - images + len(test.unreadable)
    return scores | ({"images_unreadable": unreadable} if unreadable else {})


class Task:
    """Training and test images, their classes, and the scores of a classifier.

    Raises:
        ValueError, LookupError: if the data do not fit together; the message names the key to set.
    """

    def __init__(self, cfg: Config, backbone: Backbone, pooling: Pooling) -> None:
        self.cfg, self.backbone, self.pooling = cfg, backbone, pooling
        self.multi_label = bool(cfg.labels)
        self.train = open_source(cfg.train, "train", backbone, cfg.max_train, not self.multi_label)
        self.test = open_source(cfg.test, "test", backbone, cfg.max_test, not self.multi_label)
        self.table = read_json(cfg.labels, "labels") if self.multi_label else {}
        self.classes = (
            classes_in(self.table, cfg.labels) if self.multi_label else shared_classes(self.train, self.test)
        )
        self.shared = count_shared(cfg, self.train, self.test)

    def features(
        self, key: str, source: ImageSource, transform: Transform | None = None, draw: int = 0
    ) -> Features:
        """Features of a source; every image must have a label, unless images have several."""
        return image_features(
            self.cfg, key, self.backbone, source, self.pooling, transform, draw, not self.multi_label
        )

    def targets(self, source: ImageSource, features: Features) -> Tensor:
        """The classes of the images: (N,) int64, or (N, C) bool if they have several classes."""
        if not self.multi_label:
            return features.y
        return self._multi_hot(self.table, source, self.cfg.labels, features)

    def target_function(self, source: ImageSource) -> Callable[[Tensor, Tensor], Tensor]:
        """From the labels (b,) and the numbers (b,) of images to their targets."""
        if not self.multi_label:
            return lambda labels, images: labels
        table = multi_hot(self.table, source, range(len(source)), self.classes, self.cfg.labels)
        return lambda labels, images: table[images]

    def scores(self, classify: Callable[[Tensor], Tensor], test: Features, y: Tensor) -> dict[str, float]:
        """Scores of a classifier, from features (N, W) to logits (N, C), on all test sets."""
        logits = classify(test.x)
        if self.multi_label:
            return {"mAP": mean_average_precision(logits, y)}
        scores = class_scores(logits, y)
        if self.cfg.real:
            table = read_json(self.cfg.real, "real")
            scores["real"] = accepted_share(logits, self._multi_hot(table, self.test, self.cfg.real, test))
        for name, section in (self.cfg.also or {}).items():
            also = self._scores_also(name, section, classify)
            scores |= {f"{name} {key}": value for key, value in also.items()}
        return scores

    def _scores_also(
        self, name: str, section: Mapping[str, Any], classify: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Scores on a further set, with the logits of its classes only."""
        source = open_source(section, f"also.{name}", self.backbone)
        classes = class_map(source, name, self.cfg.maps.get(name, ""), self.classes)
        shared = count_shared(self.cfg, self.train, source, f"also.{name}")
        features = self.features(f"also.{name}", source)
        scores = named_optimistic(class_scores(classify(features.x)[:, classes], features.y), shared)
        return {key: value for key, value in scores.items() if key != "images_shared"}

    def _multi_hot(self, table: Any, source: ImageSource, path: str, features: Features) -> Tensor:
        images = readable_images(source, features)
        return multi_hot(table, source, images, self.classes, path).to(device_of(self.backbone))


def _train(
    cfg: Config, task: Task, grid: LinearGrid, partial: PartialResult
) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """Train all heads. Returns features and targets of the held-out images, and how many could be read."""
    fit, held_out = torch.arange(len(task.train)), torch.arange(0)
    if cfg.select == "train":
        fit, held_out = split_images(len(task.train), cfg.held_out, cfg.seed)
    device, state = device_of(task.backbone), partial.load()
    unreadable = torch.zeros(len(task.train), dtype=torch.uint8)  # 1 for an image that cannot be read
    if state is not None:
        grid.load_state_dict(state)
        unreadable.copy_(state["unreadable"])
    start = step = 0 if state is None else int(state["step"])
    prepare = _cached if cfg.mode == "cached" else _online
    batches, choose = prepare(cfg, task, fit, held_out, start, unreadable)

    def training_state() -> dict[str, Any]:
        of_all = all_reduce_max(unreadable.to(device)).cpu()  # the first process saves
        return {"step": step, "unreadable": of_all, **grid.state_dict()}

    with partial.saved_on_exit(training_state):
        heads = len(list(grid.classifiers()))
        for x, y in watch(batches, cfg.steps, f"{heads} heads", start, together=True):
            factor = (1 + math.cos(math.pi * step / cfg.steps)) / 2
            grid.step(x, y, cfg.step_batch, cfg.momentum, factor)
            step += 1
            if step % cfg.save_every == 0:
                partial.save(training_state())
    unreadable = all_reduce_max(unreadable.to(device)).cpu()
    if cfg.mode == "online":
        names = [task.train.name(i) for i in fit[unreadable[fit] > 0].tolist()]
        report_unreadable("train", names, len(fit), cfg.max_unreadable)
    return choose, len(task.train) - int(unreadable.sum())


def _cached(
    cfg: Config, task: Task, fit: Tensor, held_out: Tensor, start: int, unreadable: Tensor
) -> tuple[Batches, tuple[Tensor, Tensor] | None]:
    """Batches of features that are computed once, and the held-out features and targets.

    Sets `unreadable` to 1 for an image that cannot be read.
    """
    centre = task.features("train", task.train)
    y = task.targets(task.train, centre)
    images = readable_images(task.train, centre)
    unreadable.fill_(1)[images] = 0
    mask = torch.zeros(len(task.train), dtype=torch.bool)
    mask[held_out] = True
    mask = mask[images]
    choose = (centre.x[mask], y[mask]) if len(held_out) else None
    rows = (~mask).nonzero().flatten()
    views = [centre.x]
    if cfg.views:
        crop = RandomResizedCrop(cfg.size or task.backbone.input.size, cfg.seed)
        views = [task.features("train", task.train, crop, draw).x for draw in range(cfg.views)]
    order = ImageOrder(len(rows), cfg.step_batch, cfg.seed)
    return cached_batches(views, y, rows, order, start, cfg.steps), choose


def _online(
    cfg: Config, task: Task, fit: Tensor, held_out: Tensor, start: int, unreadable: Tensor
) -> tuple[Batches, tuple[Tensor, Tensor] | None]:
    """As `_cached`, but images are cropped and shown again every time; `unreadable` is set meanwhile."""
    choose = None
    if len(held_out):
        source = Subset(task.train, held_out.tolist())
        features = task.features("train", source)
        choose = features.x, task.targets(source, features)
        unreadable[held_out] = 1
        unreadable[held_out[readable_images(source, features)]] = 0
    return _online_batches(cfg, task, fit, start, unreadable), choose


def _online_batches(cfg: Config, task: Task, fit: Tensor, start: int, unreadable: Tensor) -> Batches:
    """Features of new random crops, and targets, of the steps from `start` on.

    Raises:
        ValueError: if no image of a step can be read, or features are not finite.
    """
    backbone, device = task.backbone, device_of(task.backbone)
    precision = DTYPES[pick_precision(cfg.precision, device)]
    target = task.target_function(task.train)
    crop = RandomResizedCrop(cfg.size or backbone.input.size, cfg.seed)
    order = ImageOrder(len(fit), cfg.step_batch, cfg.seed)
    requests = (
        [(image, epoch) for epoch, rows in order(step) for image in fit[rows].tolist()]
        for step in range(start, cfg.steps)
    )
    for loaded in image_loader(task.train, crop, requests, cfg.workers):
        valid = loaded.valid
        unreadable[loaded.indices[~valid]] = 1
        if len(valid) and not valid.any():
            raise ValueError(
                f"None of the {len(valid)} images of a step can be read, such as {loaded.unreadable[0]}."
            )
        features = [torch.empty(0, task.pooling.width(backbone), device=device)]
        with frozen(backbone), torch.inference_mode():
            for crops in (crops for images, _ in loaded.groups for crops in images.split(cfg.batch)):
                pixels = normalised(backbone, crops.to(device))
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    features.append(task.pooling(backbone, pixels))
            x = torch.cat(features)
        if not x.isfinite().all():
            raise ValueError(
                "Features are not finite: the weights are broken, or the precision is too narrow."
            )
        yield x, target(loaded.labels[valid], loaded.indices[valid]).to(device)


def _quality(grid: LinearGrid, x: Tensor, y: Tensor) -> Quality:
    """What each head is chosen by: top-1, or mAP if images have several classes; -1 if it diverged."""
    if y.ndim == 1:
        return grid.accuracies(x, y, ROWS)
    quality: Quality = {}
    for head, _, _ in grid.classifiers():  # one at a time: (N, C) logits of all would fill the memory
        logits = grid.logits_of(head, x)
        quality[head] = (mean_average_precision(logits, y) if logits.isfinite().all() else -1.0, 0.0)
    return quality


def _check_best(cfg: Config, best: Head, score: float) -> None:
    if score < 0:
        raise ValueError("Every head of the grid diverged: take smaller lr=[...].")
    if best.lr == max(cfg.lr) > min(cfg.lr) and score < 1:
        larger = ",".join(f"{best.lr * times:g}" for times in LARGER)
        info(
            f"The best head has the largest rate, lr={best.lr:g}. Short features, and few steps, need larger "
            f"ones: try lr=[{larger}]."
        )


def _save_heads(out: Path, grid: LinearGrid, quality: Quality) -> None:
    """The best head on each input that released classifiers have, in their files' layout: weight and bias."""
    for shape, name in HUB.items():
        candidates = [(quality[head], head) for head in quality if (head.blocks, head.pool) == shape]
        if candidates:
            best = max(candidates, key=lambda pair: pair[0])[1]
            weight, bias = grid.tensors_of(best)
            # Into an open file: one that torch opens gets its own name written into it, here a temporary one.
            with atomic(out / name) as temporary, temporary.open("wb") as file:
                torch.save({"weight": weight.cpu(), "bias": bias.cpu()}, file)
