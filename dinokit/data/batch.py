"""Training samples and batches: the crops of B images, their colour parameters and their masks.

Crops are crop-major: crop 0 of all images, then crop 1 of all images, and so on; row g * B + i is crop g of
image i.

Letters: B images in this batch on this process, G global crops, L local crops, C channels, N patches,
P columns of colour parameters, M masked patches.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinokit.config.load import CropGroup, Crops
from dinokit.data import augment
from dinokit.data.decode import MAX_PIXELS, UNREADABLE, ImageLike
from dinokit.data.masks import BlockMasks
from dinokit.data.sampler import generator, hash_key, image_at, permute
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import CropBoxes, MultiCrop, decode_reduced, size_of

CROPS, COLOUR, MASKS = range(3)  # streams of random numbers of one place
SIZES = 3  # the stream of one step
ATTEMPTS = 20  # images tried for one place before the run stops with an error


@dataclass
class Sample:
    """One image of a step, made in a worker."""

    step: int
    global_crops: Tensor  # (G, C, S, S) uint8 or float32
    local_crops: Tensor  # (L, C, s, s)
    global_colour: Tensor  # (G, P) float32
    local_colour: Tensor  # (L, P)
    masks: Tensor | None  # (G, N) bool
    unreadable: dict[str, str] = field(default_factory=dict)  # images replaced by this one: name -> reason
    gram_crops: Tensor | None = None  # (G, C, Z, Z): the global crops at crops.gram_size


@dataclass
class Batch:
    """B images of a step. The colour parameters stay on the CPU, where `Photometric` reads them."""

    step: int
    images: int  # B
    global_crops: Tensor  # (G*B, C, S, S) uint8, or float32 in [0, 1]
    local_crops: Tensor  # (L*B, C, s, s); L may be 0
    global_colour: Tensor  # (G*B, P) float32
    local_colour: Tensor  # (L*B, P) float32
    masks: Tensor | None  # (G*B, N) bool; None without masked losses
    masked: Tensor  # (M,) int64: indices of the masked patches in the flattened masks
    mask_weight: Tensor  # (M,) float32: 1 / number of masked patches in the same crop
    unreadable: dict[str, str] = field(default_factory=dict)  # name -> reason
    gram_crops: Tensor | None = None  # (G*B, C, Z, Z): the global crops at another size, without colour
    teacher_cls: Tensor | None = None  # (G*B, w): what a shared teacher computed (dinokit/train/students.py)
    teacher_patches: Tensor | None = None  # (G*B, N, w)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its pixels and masks on `device`; does not wait if its memory is pinned."""
        return self._map_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with its pixels and masks in page-locked memory. The DataLoader calls it."""
        return self._map_tensors(Tensor.pin_memory)

    def split(self, count: int) -> "list[Batch]":
        """`count` micro-batches of equally many images, in order, for gradient accumulation.

        Split before moving to a device: the masked patches are searched again, which would wait for a GPU.

        Raises:
            ValueError: if the number of images is not divisible by `count`.
        """
        if count < 1 or self.images % count:
            raise ValueError(
                f"a batch of {self.images} images cannot be split into {count} equal micro-batches."
            )
        if count == 1:
            return [self]
        size = self.images // count
        return [self._micro_batch(i * size, size) for i in range(count)]

    def _micro_batch(self, start: int, size: int) -> "Batch":
        def take(x: Tensor) -> Tensor:
            rows = x.unflatten(0, (-1, self.images)) if len(x) else x[:, None]
            return rows[:, start : start + size].flatten(0, 1)

        masks = None if self.masks is None else take(self.masks)
        masked, weight = _masked_patches(masks)
        return Batch(
            step=self.step, images=size,
            global_crops=take(self.global_crops), local_crops=take(self.local_crops),
            global_colour=take(self.global_colour), local_colour=take(self.local_colour),
            masks=masks, masked=masked, mask_weight=weight,
            unreadable=self.unreadable if start == 0 else {},  # reported once
            gram_crops=None if self.gram_crops is None else take(self.gram_crops),
            teacher_cls=None if self.teacher_cls is None else take(self.teacher_cls),
            teacher_patches=None if self.teacher_patches is None else take(self.teacher_patches),
        )  # fmt: skip

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            global_crops=change(self.global_crops),
            local_crops=change(self.local_crops),
            masks=None if self.masks is None else change(self.masks),
            masked=change(self.masked),
            mask_weight=change(self.mask_weight),
            gram_crops=None if self.gram_crops is None else change(self.gram_crops),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """The samples of one step as a batch."""
    masks = [sample.masks for sample in samples if sample.masks is not None]
    stacked = _crop_major(masks) if masks else None
    masked, weight = _masked_patches(stacked)
    gram = [sample.gram_crops for sample in samples if sample.gram_crops is not None]
    return Batch(
        step=samples[0].step,
        images=len(samples),
        global_crops=_crop_major([sample.global_crops for sample in samples]),
        local_crops=_crop_major([sample.local_crops for sample in samples]),
        global_colour=_crop_major([sample.global_colour for sample in samples]),
        local_colour=_crop_major([sample.local_colour for sample in samples]),
        masks=stacked,
        masked=masked,
        mask_weight=weight,
        unreadable={name: reason for sample in samples for name, reason in sample.unreadable.items()},
        gram_crops=_crop_major(gram) if gram else None,
    )


def stack(rows: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.stack(); if dtypes differ, uint8 rows are scaled to [0, 1], since a source may mix bit depths."""
    if len({row.dtype for row in rows}) > 1:
        rows = [row.float() / 255 if row.dtype == torch.uint8 else row for row in rows]
    return torch.stack(list(rows), dim=dim)


def _crop_major(rows: Sequence[Tensor]) -> Tensor:
    """B tensors (crops, ...) -> (crops * B, ...)."""
    return stack(rows, dim=1).flatten(0, 1)


def _masked_patches(masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The indices of True in flattened masks (G*B, N), and 1 / number of True in the same row: (M,), (M,)."""
    if masks is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    masked = masks.flatten().nonzero().flatten()
    weight = 1 / masks.sum(dim=1).clamp(min=1).float()  # (G*B,)
    return masked, weight[masked // masks.shape[1]]


class TrainDataset(Dataset[Sample]):
    """The samples of a run, by (step, place). An unreadable image is named, and another takes its place.

    A sample is a function of (step, place) alone.

    Raises:
        ValueError: if crops.decode=reduced and the source has no files to decode.
    """

    def __init__(
        self, source: ImageSource, crops: Crops, masks: BlockMasks | None, seed: int, batch: int
    ) -> None:
        if crops.decode == "reduced" and not hasattr(source, "stored"):
            raise ValueError(
                f"crops.decode=reduced decodes JPEG files, but the source {type(source).__name__} has images "
                f"without files. Set crops.decode=whole, or give the source a method stored(index) -> bytes."
            )
        self.source, self.crops, self.seed, self.batch = source, crops, seed, batch
        self.multi_crops = [MultiCrop(variant) for variant in crops.variants]
        self.masks: list[BlockMasks | None] = [None] * len(self.multi_crops)
        if masks is not None:
            patch = crops.globals.size // masks.grid[0]  # pixels
            sides = [variant.globals.size // patch for variant in crops.variants]
            self.masks = [BlockMasks(masks.cfg, (side, side)) for side in sides] if crops.mixed else [masks]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        step, place = key
        variant = self.variant(step)
        (global_crops, local_crops, gram_crops), unreadable = self._crops(self.multi_crops[variant], *key)
        rng = generator(self.seed, step, place, COLOUR)
        return Sample(
            step=step,
            global_crops=global_crops,
            local_crops=local_crops,
            global_colour=self._colour(self.crops.globals, rng),
            local_colour=self._colour(self.crops.locals, rng),
            masks=self._masks(self.masks[variant], *key),
            unreadable=unreadable,
            gram_crops=gram_crops,
        )

    def variant(self, step: int) -> int:
        """The number of the entry of crops.variants that a step has: a function of (seed, step)."""
        shares = np.cumsum([entry[0] for entry in self.crops.mixed] or [1.0])
        drawn = generator(self.seed, step, 0, SIZES).random() if self.crops.mixed else 0.0
        return int(np.searchsorted(shares, drawn * shares[-1], side="right"))

    def _crops(
        self, multi_crop: MultiCrop, step: int, place: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, str]]:
        unreadable: dict[str, str] = {}
        for index in candidates(len(self.source), self.seed, step, place, self.batch):
            try:
                rng = generator(self.seed, step, place, CROPS)
                image, boxes = self.read_image(index, multi_crop, rng)
                gram = multi_crop.gram(image, boxes) if multi_crop.cfg.gram_size else None
                return (*multi_crop(image, boxes), gram), unreadable
            except UNREADABLE as error:
                name = self.source.name(index)
                unreadable[name] = str(error).removeprefix(f"{name} cannot be read: ") or type(error).__name__
        raise OSError(
            f"{len(unreadable)} images in a row cannot be read, the last of them "
            f"{', '.join(list(unreadable)[-3:])}: {list(unreadable.values())[-1]}"
        )

    def read_image(
        self, index: int, multi_crop: MultiCrop, rng: np.random.Generator
    ) -> tuple[ImageLike, CropBoxes]:
        """A decoded image, and the boxes of its crops."""
        if self.crops.decode == "reduced":
            source: Any = self.source
            limit = getattr(source, "max_pixels", MAX_PIXELS)
            orient: Any = getattr(source, "orient", "exif")
            data, name = source.stored(index), source.name(index)
            return decode_reduced(data, name, multi_crop, rng, limit, orient)
        image, _ = self.source[index]
        return image, multi_crop.draw(*size_of(image), rng)

    def _colour(self, group: CropGroup, rng: np.random.Generator) -> Tensor:
        rows = np.zeros((group.count, augment.COLUMNS), dtype=np.float32)
        for crop in range(group.count):
            rows[crop] = augment.draw(self.crops, group, crop, rng)
        return torch.from_numpy(rows)

    def _masks(self, masks: BlockMasks | None, step: int, place: int) -> Tensor | None:
        if masks is None:
            return None
        total = self.crops.globals.count * self.batch
        numbers = range(place, total, self.batch)  # crop-major, as in a batch
        rows = [masks(self.seed, step, j, total, generator(self.seed, step, j, MASKS)) for j in numbers]
        return torch.from_numpy(np.stack(rows))


def candidates(images: int, seed: int, step: int, place: int, batch: int) -> Iterator[int]:
    """The image of a place, of `images`, then other images in case it is unreadable; none twice."""
    first = image_at(seed, step * batch + place, images)
    yield first
    for attempt in range(min(ATTEMPTS, images)):
        other = permute(attempt, images, hash_key(seed, step, place))
        if other != first:
            yield other


def names_of_step(
    source: ImageSource, seed: int, step: int, batch: int, unreadable: Container[str]
) -> list[str]:
    """The names of the images of a step, one a place of the batch over all processes.

    Args:
        source: the images.
        seed: of the run.
        step: from 0.
        batch: images in a step over all processes.
        unreadable: names of images that others take the place of.
    """
    places = (candidates(len(source), seed, step, place, batch) for place in range(batch))
    names = (map(source.name, indices) for indices in places)
    return [next((name for name in each if name not in unreadable), "") for each in names]
