"""What evaluators of patch features share: the frozen backbone, windows, and the training of a head.

b  images of a step     C  channels     D  width     H, W  of an image     h, w  patches down and across
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from dinokit.config import registry
from dinokit.data.dense import CheckedMaps, DenseSource
from dinokit.data.dense_transforms import (
    BORDERS,
    pad_image,
    pad_map,
    resize_image,
    resize_map,
    shorter_side_to,
)
from dinokit.data.loader import DenseSample, DenseTransform, dense_loader, dense_training_loader
from dinokit.data.sampler import image_at
from dinokit.data.transforms import to_uint8
from dinokit.features import Map, dense, device_of, patch_width, spread
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, Precision, pick_precision
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch
from dinokit.runtime.partial import PartialResult

AT_ONCE = 16  # windows that the backbone sees at a time
BLOCK = 512  # patches compared at a time: with 100,000 others, a block of cosines is 200 MiB

Schedule = Callable[[int, int, int], float]  # a step, all steps and those of the warm-up -> a factor
Rates = Sequence[tuple[list[nn.Parameter], Schedule]]  # parameters with the factor of their learning rate
Batch = tuple[list[Map], Tensor]  # of a training step: feature maps of each block, and the truth (b, H, W)
Window = tuple[int, int, int, int]  # top, left, bottom, right


class AdamWSettings(Protocol):
    """Settings of train_head()."""

    steps: int
    lr: float  # peak
    weight_decay: float  # of matrices and kernels alone
    warmup: float  # share of the steps
    save_every: int  # steps


class HeadSettings(AdamWSettings, Protocol):
    """Settings of a head's training on maps, in every Config that has one."""

    augment: bool  # random crops, which the backbone sees anew in every step; else windows, seen once
    resize: int  # pixels of the shorter side; 0: as stored
    batch: int
    cache_gib: float  # memory that features of windows may take
    seed: int
    workers: int


class DenseBackbone:
    """A frozen backbone that gives feature maps of some of its blocks.

    Args:
        backbone: in eval mode.
        blocks: indices.
        precision: a setting, "auto" as in training.
        norm: whether features are taken after the final norm.

    Raises:
        ValueError: if the backbone has no patches.
    """

    def __init__(
        self, backbone: Backbone, blocks: list[int], precision: Precision | Literal["auto"], norm: bool = True
    ) -> None:
        self.backbone, self.blocks, self.norm = backbone, blocks, norm
        self.device, self.width = device_of(backbone), patch_width(backbone)
        self.precision = DTYPES[pick_precision(precision, self.device)]

    def __call__(self, images: Tensor) -> list[Map]:
        """Images (b, C, H, W) -> a Map of each block."""
        return dense(self.backbone, images.to(self.device), self.blocks, self.norm, self.precision)


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
    if "." in section["name"]:
        source = CheckedMaps(source)
    if bool(source.classes) != (target == "mask"):
        have, needed = ("classes", "depths") if source.classes else ("depths", "classes")
        raise ValueError(f"{split}.name={section['name']} gives maps of {have}; this evaluates {needed}.")
    if not len(source):
        raise ValueError(f"{split}.name={section['name']} has no image.")
    return cast(DenseSource, spread(cast(Any, source), limit))  # a Subset gives what its source gives


def read_pairs(source: DenseSource, workers: int, text: str, share: bool = False) -> Iterator[DenseSample]:
    """All pairs of a source, or this process's `share` of them, with progress under the title `text`."""
    indices = range(rank(), len(source), world_size()) if share else range(len(source))
    return watch(dense_loader(source, indices, workers), len(indices), text)


def cut_and_resize(image: Tensor, target: Tensor, border: str, resize: int) -> tuple[Tensor, Tensor]:
    """An image (C, H, W) uint8 and its map (H, W) without the border, the shorter side `resize` unless 0."""
    top, bottom, left, right = BORDERS[border](*target.shape)
    image, target = image[:, top:bottom, left:right], target[top:bottom, left:right]
    if not resize:
        return image, target
    size = shorter_side_to(image, resize)
    return to_uint8(resize_image(image.float() / 255, *size)), resize_map(target, *size)


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


def labels_of_nearest(
    x: Tensor, keys: Tensor, labels: Tensor, k: int, temp: float, near: Tensor | None = None
) -> Tensor:
    """Labels of patches from those of the k most similar other patches. The search is exact.

    Args:
        x: (Q, D), on the unit sphere.
        keys: (N, D), likewise.
        labels: (N, C) shares of each label in these patches.
        k: patches that labels come from; each weighs softmax(cosine / temp) over the k.
        temp: temperature of the weights.
        near: (Q, M) bool, which of the keys count, repeated N / M times; None: all.

    Returns:
        (Q, C).
    """
    result = []
    for start in range(0, len(x), BLOCK):
        cosines = x[start : start + BLOCK] @ keys.T
        if near is not None:
            far = ~near[start : start + BLOCK].repeat(1, len(keys) // near.shape[1])
            cosines.masked_fill_(far, float("-inf"))
        values, indices = cosines.topk(min(k, len(keys)), dim=1)
        weights = (values / temp).softmax(dim=1)
        result.append(torch.einsum("qk,qkc->qc", weights, labels[indices]))
    return torch.cat(result)


def training_batches(
    cfg: HeadSettings, dense: DenseBackbone, source: DenseSource, transform: DenseTransform, border: str,
    crop: tuple[int, int], stride: tuple[int, int], fill: int,
) -> Callable[[int], Iterator[Batch]]:  # fmt: skip
    """From the number of a step to this process's training batches from there on.

    Args:
        cfg: how a head is trained.
        dense: the backbone.
        source: training images.
        transform: of the random crops, with augment=true. With augment=false:
        border: what is cut off images, a key of BORDERS.
        crop: height and width of a window.
        stride: down and across, between two windows.
        fill: the truth beyond an image that is smaller than a window.

    Raises:
        ValueError: if features of windows would not fit in cfg.cache_gib, or a pair cannot be read.
    """
    if not cfg.augment:
        features = window_features(cfg, dense, source, border, crop, stride, fill)
        return lambda start: features.batches(cfg.seed, cfg.batch, start, cfg.steps)

    def online(start: int) -> Iterator[Batch]:
        for images, truth in dense_training_loader(
            source, transform, seed=cfg.seed, start_step=start, steps=cfg.steps, batch=cfg.batch,
            rank=rank(), world=world_size(), workers=cfg.workers,
        ):  # fmt: skip
            yield dense(images), truth.to(dense.device)

    return online


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
    cfg: HeadSettings, dense: DenseBackbone, source: DenseSource, border: str, crop: tuple[int, int],
    stride: tuple[int, int], fill: int,
) -> WindowFeatures:  # fmt: skip
    """Features of all windows of all pairs, as training_batches(). Each process computes all."""
    features: list[list[Map]] = []
    truths: list[Tensor] = []
    images: list[Tensor] = []
    colour = tuple(dense.backbone.input.mean)
    size = 0.0
    for pair in read_pairs(source, cfg.workers, "features of training images"):
        image, target = cut_and_resize(pair.image, pair.target, border, cfg.resize)
        boxes = windows(target.shape[0], target.shape[1], crop, stride)
        for number, (top, left, bottom, right) in enumerate(boxes, 1):
            window = image[:, top:bottom, left:right].float() / 255
            images.append(pad_image(window, crop, colour))
            truths.append(pad_map(target[top:bottom, left:right], crop, fill))
            last = pair.index + 1 == len(source) and number == len(boxes)
            if len(images) == AT_ONCE or last:
                maps = [Map(m.patches.half(), m.cls.half()) for m in dense(torch.stack(images))]
                size += sum(m.patches.nbytes + m.cls.nbytes for m in maps) + len(images) * truths[-1].nbytes
                features.append(maps)
                images = []
        if size > cfg.cache_gib * 2**30:
            total = size / 2**30 * len(source) / (pair.index + 1)
            raise ValueError(
                f"Features of all training windows would take about {total:.1f} GiB, more than "
                f"cache_gib={cfg.cache_gib:g}. Raise it, take fewer images by max_train or a smaller crop, "
                f"or set augment=true, which computes them at every step."
            )
    maps = [
        Map(torch.cat([m.patches for m in block]), torch.cat([m.cls for m in block]))
        for block in zip(*features, strict=True)
    ]
    return WindowFeatures(maps, torch.stack(truths).to(dense.device))


def poly(step: int, steps: int, warmup: int) -> float:
    """Factor of the rate: a line from 1 to 0, times one from 1e-6 to 1 over the first `warmup` steps."""
    return (1 - step / steps) * _warmup(step, warmup, 1e-6)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the rate: a half cosine from 1 to 1e-8, times a line from 1e-3 to 1 over `warmup` steps."""
    return (1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * step / steps)) / 2) * _warmup(step, warmup, 1e-3)


def _warmup(step: int, warmup: int, ratio: float) -> float:
    return 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)


def train_head(
    cfg: AdamWSettings, head: nn.Module, batches: Callable[[int], Iterator[tuple[Any, Tensor]]],
    loss: Callable[[Any, Tensor, int], Tensor], schedule: Schedule | Rates, partial: PartialResult,
    clip: float = 0.0,
) -> None:  # fmt: skip
    """Train `head` in place by AdamW, and leave it in eval mode.

    Args:
        cfg: how it is trained.
        head: on the device to compute on, equal in all processes.
        batches: of this process, from the given step on.
        loss: of maps, or what else `batches` gives, and truth at a step, (); it calls the head.
        schedule: factor of the learning rate of all parameters, or of each part of them.
        partial: the state to resume from; it stays until the scores are computed.
        clip: largest gradient norm; 0 is off.

    Raises:
        ValueError: if the loss is not finite.
    """
    groups: list[dict[str, Any]] = []
    factors: list[Schedule] = []
    for parameters, factor in [(list(head.parameters()), schedule)] if callable(schedule) else schedule:
        groups.append({"params": [p for p in parameters if p.ndim > 1]})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
        factors += [factor, factor]
    optimizer = torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay)
    head.train()
    warmup = round(cfg.warmup * cfg.steps)
    state = partial.load()
    if state is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    start = step = 0 if state is None else int(state["step"])
    remaining = batches(start) if start < cfg.steps else iter(())

    def training_state() -> dict[str, Any]:
        return {"step": step, "head": head.state_dict(), "optimizer": optimizer.state_dict()}

    with partial.saved_on_exit(training_state):
        for maps, truth in watch(remaining, cfg.steps, "train head", start, together=True):
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = cfg.lr * factor(step, cfg.steps, warmup)
            value = loss(maps, truth, step)
            if not value.isfinite():
                raise ValueError(
                    f"The loss of step {step} is {value.item()}: the features are not finite, or "
                    f"lr={cfg.lr} is too high."
                )
            optimizer.zero_grad()
            value.backward()
            _average_over_processes(head)
            if clip:
                nn.utils.clip_grad_norm_(head.parameters(), clip)
            optimizer.step()
            step += 1
            if step % cfg.save_every == 0:
                partial.save(training_state())
    head.eval()


def _average_over_processes(head: nn.Module) -> None:
    """Average gradients, and statistics of what is in training mode, in one sum of all concatenated."""
    if world_size() == 1:
        return
    tensors = [p.grad for p in head.parameters() if p.grad is not None]
    buffers = [buffer for module in head.modules() if module.training for buffer in module.buffers(False)]
    tensors += [buffer for buffer in buffers if buffer.is_floating_point()]
    total = all_reduce_sum(torch.cat([x.flatten() for x in tensors])) / world_size()
    for x, mean in zip(tensors, total.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))
