"""Attentive probe: a small head looks for the patches that matter, on frozen features.

Bardes et al. 2024 (V-JEPA, arXiv 2404.08471): one learned query attends to the patches of the last block,
and an MLP and a linear classifier follow. It shows what patches know and the class token does not, and
networks that learn by predicting patches are compared by it. One head is trained for each rate; the best on
images held out of the training set is evaluated on the test images. Images are seen in their centre crop.

    b  images      N  patches of an image      D  width      C  classes
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config.registry import check_at_least
from dinokit.data.sources import images_stamp
from dinokit.eval import ClassificationConfig
from dinokit.eval._dense import cosine, train_head
from dinokit.eval._images import (
    count_shared,
    image_features,
    image_sizes,
    named_optimistic,
    open_source,
    partial_result,
    shared_classes,
    split_images,
)
from dinokit.eval._linear_grid import ImageOrder, cached_batches
from dinokit.eval._metrics import class_scores
from dinokit.features import AllPatches, device_of
from dinokit.models import Backbone
from dinokit.runtime.distributed import memory, world_size

SHARE = 0.8  # of the memory that patches may fill
GIB = 2**30


@dataclass
class Config(ClassificationConfig):
    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3)  # of AdamW; a head for each
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the steps; the rate then falls along a cosine
    steps: int = 2_000
    step_batch: int = 256  # images a step, over all processes
    heads: int = 0  # of attention; 0: one for each 64 channels, as far as that divides the width
    held_out: float = 0.1  # share of the training images, by which the rate is chosen
    seed: int = 0
    out: str | None = None  # folder for an unfinished training, which resumes
    save_every: int = 500  # steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, steps=1, step_batch=1, save_every=1, heads=0, seed=0, weight_decay=0, warmup=0)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: it must lie between 0 and 1.")
        if self.warmup > 1:
            raise ValueError(f"warmup={self.warmup}: it is a share of the steps, 1 at most.")
        if not self.lr or min(self.lr) <= 0:
            raise ValueError(f"lr={list(self.lr)}: give one rate above 0, or several.")


class AttentiveHead(nn.Module):
    """Patches (b, N, D) to logits (b, C): cross-attention of one query, an MLP, a linear classifier.

    Raises:
        ValueError: if `heads` does not divide the width.
    """

    def __init__(self, width: int, classes: int, heads: int = 0) -> None:
        super().__init__()
        heads = heads or math.gcd(width, max(width // 64, 1))
        if width % heads:
            raise ValueError(f"heads={heads} does not divide the {width} numbers of a patch: heads=0 does.")
        self.query = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.linear = nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """(b, N, D) to (b, C)."""
        query, x = self.query.expand(len(patches), -1, -1), self.norm1(patches)
        x = query + self.attention(query, x, x, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        logits: Tensor = self.linear(x[:, 0])
        return logits


@dataclass
class _Training:
    """How one head is trained, for train_head()."""

    lr: float
    steps: int
    warmup: float
    weight_decay: float
    save_every: int


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Accuracy of the best head.

    Returns:
        'top1', 'top5' and 'mean_per_class' on the test images; 'held_out', the accuracy that the head was
        chosen by, and its 'lr'; 'images_train', 'images_test', and 'images_unreadable' if there are any.

    Raises:
        ValueError, LookupError: if the data do not fit, the patches do not fit the memory, or the backbone
            gives no map of patches; the message names the key to set.
    """
    train_source = open_source(cfg.train, "train", backbone, cfg.max_train)
    test_source = open_source(cfg.test, "test", backbone, cfg.max_test)
    classes = shared_classes(train_source, test_source)
    shared = count_shared(cfg, train_source, test_source)
    pooling = AllPatches(size=image_sizes(cfg, backbone)[1])
    _check_memory(len(train_source) + len(test_source), pooling.width(backbone), device_of(backbone))
    uncached = replace(cfg, cache=None)  # the patches would fill it
    train = image_features(uncached, "train", backbone, train_source, pooling)
    test = image_features(uncached, "test", backbone, test_source, pooling)
    count = (pooling.size // backbone.patch) ** 2  # N
    fit, held_out = split_images(len(train.x), cfg.held_out, cfg.seed)
    order = ImageOrder(len(fit), cfg.step_batch, cfg.seed)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return cached_batches([train.x], train.y, fit, order, start, cfg.steps)

    found, unfinished = [], []
    for lr in cfg.lr:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            head = AttentiveHead(train.x.shape[1] // count, len(classes), cfg.heads)
        head = head.to(device_of(backbone))
        settings = _Training(lr, cfg.steps, cfg.warmup, cfg.weight_decay, cfg.save_every)
        unfinished.append(partial_result(cfg, "attentive_probe", backbone, lr, images_stamp(train_source)))
        train_head(
            settings, head, batches, partial(_loss, head, count, cfg.step_batch), cosine, unfinished[-1]
        )
        logits = _logits(head, train.x[held_out.to(train.x.device)], count, cfg.batch)
        found.append((class_scores(logits, train.y[held_out.to(train.y.device)])["top1"], -lr, head))
    chosen_by, minus_lr, best = max(found, key=lambda each: each[:2])
    scores = named_optimistic(class_scores(_logits(best, test.x, count, cfg.batch), test.y), shared)
    scores |= {"held_out": chosen_by, "lr": -minus_lr}
    scores |= {"images_train": len(train.x), "images_test": len(test.x)}
    for each in unfinished:
        each.remove()
    unreadable = len(train.unreadable) + len(test.unreadable)
    return scores | ({"images_unreadable": unreadable} if unreadable else {})


def _loss(head: AttentiveHead, count: int, images: int, x: Tensor, y: Tensor, _: int) -> Tensor:
    """The share of this process in the mean cross-entropy of a step, times the number of processes."""
    logits = head(x.unflatten(1, (count, -1)))
    return F.cross_entropy(logits, y, reduction="sum") * world_size() / images


@torch.no_grad()
def _logits(head: AttentiveHead, x: Tensor, count: int, batch: int) -> Tensor:
    """Logits of rows of patches (n, N * D): (n, C)."""
    return torch.cat([head(rows.unflatten(1, (count, -1))) for rows in x.split(batch)])


def _check_memory(images: int, width: int, device: torch.device) -> None:
    have = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory()
    needed = 4 * images * width
    if needed > SHARE * have:
        most = int(SHARE * have / (4 * width))
        raise ValueError(
            f"The patches of {images} images need {needed / GIB:.1f} GiB, and all are in memory at once: "
            f"there are {have / GIB:.1f} GiB, enough for {most} images. Give max_train=N and max_test=N, "
            f"or a smaller size=N."
        )
