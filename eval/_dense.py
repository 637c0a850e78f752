"""What evaluators of patch features share: the frozen backbone, windows, and the training of a head.

b  images of a step     C  channels     D  width     H, W  of an image     h, w  patches down and across
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinokit.config import registry
from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import pad_image, pad_map
from dinokit.data.loader import DenseTransform, dense_loader, dense_training_loader
from dinokit.data.sampler import image_at
from dinokit.data.sources import ImageLike
from dinokit.eval._config import DenseConfig
from dinokit.features import Map, dense, device_of, patch_width
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, Precision, pick_precision
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch
from dinokit.runtime.partial import PartialResult

AT_ONCE = 16  # windows that the backbone sees at a time

Batch = tuple[list[Map], Tensor]  # of a training step: feature maps of each block, and the truth (b, H, W)
Window = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass(frozen=True)
class DenseBackbone:
    """A frozen backbone that gives feature maps of some of its blocks."""

    backbone: Backbone
    blocks: list[int]
    norm: bool  # whether features are taken after the final norm
    precision: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return device_of(self.backbone)

    def __call__(self, images: Tensor) -> list[Map]:
        """Images (b, C, H, W) -> a Map of each block."""
        return dense(self.backbone, images.to(self.device), self.blocks, self.norm, self.precision)


def dense_backbone(
    backbone: Backbone, blocks: list[int], precision: Precision | Literal["auto"], norm: bool = True
) -> DenseBackbone:
    """The backbone in the precision of a setting.

    Raises:
        ValueError: if the backbone has no patches.
    """
    patch_width(backbone)
    return DenseBackbone(backbone, blocks, norm, DTYPES[pick_precision(precision, device_of(backbone))])


def open_dense(
    section: Mapping[str, Any] | None, split: str, target: Literal["mask", "depth"], backbone: Backbone,
    limit: int,
) -> DenseSource:  # fmt: skip
    """The dense source of a section with maps of `target`; at most `limit` pairs, evenly drawn; 0 is all.

    Raises:
        ValueError: if there is no section, its maps are of the other kind, or it is empty.
    """
    if not section or not section.get("name"):
        raise ValueError(f"{split}.name must be given; there is: {', '.join(registry.names('data.dense'))}.")
    settings = {"channels": backbone.channels, "target": target}
    keys = {item.name for item in fields(registry.find("data.dense", section["name"]).Config)}
    section = {**section, **{key: value for key, value in settings.items() if key in keys}}
    source: DenseSource = registry.build("data.dense", section)
    if bool(source.classes) != (target == "mask"):
        have, needed = ("classes", "depths") if source.classes else ("depths", "classes")
        raise ValueError(f"{split}.name={section['name']} gives maps of {have}; this evaluates {needed}.")
    if not len(source):
        raise ValueError(f"{split}.name={section['name']} has no image.")
    return _DenseSubset(source, limit) if 0 < limit < len(source) else source


class _DenseSubset:
    """Some pairs of a source: one drawn from each of `count` equal ranges, the same every time."""

    def __init__(self, source: DenseSource, count: int) -> None:
        n, draw = len(source), random.Random(0)
        self.source, self.classes = source, source.classes
        self.indices = [draw.randrange(i * n // count, (i + 1) * n // count) for i in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        return self.source[self.indices[index]]

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


def windows(height: int, width: int, crop: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """Windows of `crop` (height, width) at every `stride`; the last ones are moved back inside the image.

    All have one size: `crop`, or the image's where that is smaller.
    """
    tops, lefts = (
        [min(i * step, max(side - size, 0)) for i in range(-(-max(side - size, 0) // step) + 1)]
        for side, size, step in zip((height, width), crop, stride, strict=True)
    )
    h, w = min(crop[0], height), min(crop[1], width)
    return [(top, left, top + h, left + w) for top in tops for left in lefts]


def slide(
    image: Tensor, crop: int, stride: int, predict: Callable[[Tensor], Tensor], batch: int = 8
) -> Tensor:
    """The mean, at every pixel, of the predictions for the windows that cover it.

    Args:
        image: (C, H, W).
        crop: pixels, the side of a window.
        stride: pixels between two windows.
        predict: (b, C, h, w) -> (b, K, h, w).
        batch: windows at a time.

    Returns:
        (K, H, W).
    """
    boxes = windows(image.shape[1], image.shape[2], (crop, crop), (stride, stride))
    total = counts = torch.zeros(())
    for start in range(0, len(boxes), batch):
        some = boxes[start : start + batch]
        predicted = predict(torch.stack([image[:, t:b, le:r] for t, le, b, r in some]))
        if start == 0:
            total = predicted.new_zeros(predicted.shape[1], *image.shape[1:])
            counts = predicted.new_zeros(image.shape[1:])
        for (t, le, b, r), logits in zip(some, predicted, strict=True):
            total[:, t:b, le:r] += logits
            counts[t:b, le:r] += 1
    return total / counts


def online_batches(
    cfg: DenseConfig, dense: DenseBackbone, source: DenseSource, transform: DenseTransform, batch: int,
    start: int, steps: int,
) -> Iterator[Batch]:  # fmt: skip
    """Feature maps of random crops, which the backbone sees anew in every step."""
    for images, truth in dense_training_loader(
        source, transform, seed=cfg.seed, start_step=start, steps=steps, batch=batch, rank=rank(),
        world=world_size(), workers=cfg.workers,
    ):  # fmt: skip
        yield dense(images), truth.to(dense.device)


@dataclass
class WindowFeatures:
    """Features of n windows in float16, and the truth of every pixel, on the backbone's device."""

    maps: list[Map]  # of each block: patches (n, D, h, w), cls (n, D)
    truth: Tensor  # (n, H, W)

    def batches(self, seed: int, batch: int, start: int, steps: int) -> Iterator[Batch]:
        """This process's share of steps `start` to `steps` - 1; windows in an order of `seed`, endlessly."""
        n, share = len(self.truth), batch // world_size()
        for step in range(start, steps):
            first = step * batch + rank() * share
            rows = torch.tensor(
                [image_at(seed, first + i, n) for i in range(share)], device=self.truth.device
            )
            yield [Map(m.patches[rows].float(), m.cls[rows].float()) for m in self.maps], self.truth[rows]


def window_features(
    dense: DenseBackbone,
    source: DenseSource,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    crop: tuple[int, int],
    stride: tuple[int, int],
    fill: int,
    max_gib: float,
    workers: int,
) -> WindowFeatures:
    """Features of all windows of all pairs, for training without augmentation. Each process computes all.

    Args:
        dense: the backbone.
        source: training images.
        prepare: applied to an image (C, H, W) uint8 and its map (H, W) before they are cut into windows.
        crop: height and width of a window.
        stride: down and across, between two windows.
        fill: the truth beyond an image that is smaller than a window.
        max_gib: memory that the features may take.
        workers: loader processes.

    Raises:
        ValueError: if the features would be larger, or a pair cannot be read.
    """
    features: list[list[Map]] = []
    truths: list[Tensor] = []
    images: list[Tensor] = []
    colour = tuple(dense.backbone.input.mean)
    size = 0.0
    for pair in watch(
        dense_loader(source, range(len(source)), workers), len(source), "features of training images"
    ):
        image, target = prepare(pair.image, pair.target)
        for top, left, bottom, right in windows(target.shape[0], target.shape[1], crop, stride):
            window = image[:, top:bottom, left:right].float() / 255
            images.append(pad_image(window, crop, colour))
            truths.append(pad_map(target[top:bottom, left:right], crop, fill))
            if len(images) == AT_ONCE:
                features.append(_half_precision(dense, images))
                images = []
                size += sum(x.nbytes for m in features[-1] for x in (m.patches, m.cls))
                size += AT_ONCE * truths[-1].nbytes
        if size > max_gib * 2**30:
            total = size / 2**30 * len(source) / (pair.index + 1)
            raise ValueError(
                f"Features of all training windows would take about {total:.1f} GiB, more than "
                f"cache_gib={max_gib:g}. Raise it, take fewer images by max_train or a smaller crop, or set "
                f"augment=true, which computes them at every step."
            )
    if images:
        features.append(_half_precision(dense, images))
    maps = [
        Map(torch.cat([f[i].patches for f in features]), torch.cat([f[i].cls for f in features]))
        for i in range(len(dense.blocks))
    ]
    return WindowFeatures(maps, torch.stack(truths).to(dense.device))


def _half_precision(dense: DenseBackbone, images: list[Tensor]) -> list[Map]:
    return [Map(m.patches.half(), m.cls.half()) for m in dense(torch.stack(images))]


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained."""

    steps: int
    lr: float  # peak
    weight_decay: float  # of matrices and kernels alone
    schedule: Callable[[int], float]  # factor of the learning rate by step
    clip: float  # largest gradient norm; 0 is off
    partial: PartialResult  # the state to resume from; it stays until the scores are computed
    save_every: int  # steps


def poly(steps: int, warmup: int, ratio: float = 1e-6) -> Callable[[int], float]:
    """A line from 1 to 0, times one from `ratio` to 1 over the first `warmup` steps."""
    return lambda step: (1 - step / steps) * _warmup(step, warmup, ratio)


def cosine(steps: int, warmup: int, ratio: float = 1e-3, end: float = 1e-8) -> Callable[[int], float]:
    """A half cosine from 1 to `end`, times a line from `ratio` to 1 over the first `warmup` steps."""
    return lambda step: (
        (end + (1 - end) * (1 + math.cos(math.pi * step / steps)) / 2) * _warmup(step, warmup, ratio)
    )


def train_head(
    head: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[list[Map], Tensor, int], Tensor],
    training: HeadTraining,
) -> None:
    """Train `head` in place by AdamW, and leave it in eval mode.

    Args:
        head: on the device to compute on, equal in all processes.
        batches: of this process, from the given step on.
        loss: of maps and truth at a step, (); it calls the head.
        training: steps, optimiser and schedule.

    Raises:
        ValueError: if the loss is not finite.
    """
    kernels = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, training.lr, weight_decay=training.weight_decay)
    head.train()
    state = training.partial.load()
    if state is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    start = step = 0 if state is None else int(state["step"])
    remaining = batches(start) if start < training.steps else iter(())

    def training_state() -> dict[str, Any]:
        return {"step": step, "head": head.state_dict(), "optimizer": optimizer.state_dict()}

    with training.partial.saved_on_exit(training_state):
        for maps, truth in watch(remaining, training.steps, "train head", start, together=True):
            for group in optimizer.param_groups:
                group["lr"] = training.lr * training.schedule(step)
            value = loss(maps, truth, step)
            if not value.isfinite():
                raise ValueError(
                    f"The loss of step {step} is {value.item()}: the features are not finite, or "
                    f"lr={training.lr} is too high."
                )
            optimizer.zero_grad()
            value.backward()
            _average_over_processes(head)
            if training.clip:
                nn.utils.clip_grad_norm_(head.parameters(), training.clip)
            optimizer.step()
            step += 1
            if step % training.save_every == 0:
                training.partial.save(training_state())
    head.eval()


def _warmup(step: int, warmup: int, ratio: float) -> float:
    return 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)


def _average_over_processes(head: nn.Module) -> None:
    """Average gradients and batch statistics, in one sum of all of them concatenated."""
    if world_size() == 1:
        return
    tensors = [p.grad for p in head.parameters() if p.grad is not None]
    tensors += [buffer for buffer in head.buffers() if buffer.is_floating_point()]
    total = all_reduce_sum(torch.cat([x.flatten() for x in tensors])) / world_size()
    for x, mean in zip(tensors, total.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))
