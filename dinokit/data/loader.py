"""Loader processes: from images by number to the batches of a run, or to the crops of an evaluation.

A worker makes a Sample of (step, place) alone, without a memory of what it made before: so batches are the
same for any number of workers and processes, and a run that goes on at step k sees the rest of what it would
have seen.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinokit.config.load import CropGroup, Crops
from dinokit.data import augment
from dinokit.data.batch import Batch, Sample, collate, stack
from dinokit.data.masks import BlockMasks
from dinokit.data.reduced import read_reduced
from dinokit.data.sampler import generator, hash_key, image_at, permute
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.data.transforms import CropBoxes, MultiCrop, size_of
from dinokit.data.views import Transform
from dinokit.data.workers import UNREADABLE, Steps, data_loader

CROPS, COLOUR, MASKS = range(3)  # streams of random numbers of one place
ATTEMPTS = 20  # images tried for one place before the run gives up


class EvalBatch(NamedTuple):
    crops: Tensor  # (b, C, size, size) uint8, or float32 in [0, 1]; zeros where the image is unreadable
    labels: Tensor  # (b,) int64; -1 without a label, and where the image is unreadable
    indices: Tensor  # (b,) int64: the images' numbers in the source
    unreadable: list[str]  # names


def loader(
    source: ImageSource, crops: Crops, masks: BlockMasks | None, *, seed: int, start_step: int, steps: int,
    batch: int, rank: int = 0, world: int = 1, parts: int = 1, workers: int = -1, pin: bool = False,
) -> Iterable[Batch]:  # fmt: skip
    """This process's part of the batches of steps `start_step` to `steps` - 1.

    Args:
        source: the images; an unreadable one is named in its batch, and another takes its place.
        crops: how they are cut and coloured.
        masks: none if no loss needs them.
        seed: of everything random.
        start_step: the first step.
        steps: the step to stop before: the length of the whole run.
        batch: images a step over all processes.
        rank: the number of this process, of `world`.
        world: the number of processes.
        parts: that a process takes its share in, by Batch.split(). The images of a part, over all processes,
            are then the same for any number of these.
        workers: loader processes; -1 is one a core but one, 16 at most, and fewer if what they hold would
            fill the memory; 0 loads in this process.
        pin: whether to put batches into page-locked memory, for a GPU.

    Raises:
        ValueError: if the batch cannot be shared out, the source is empty, or as TrainDataset.
        RuntimeError: while iterating, if a worker dies (or ConnectionError, if it dies while it hands a batch
            over), or if no readable image is found for a place.
    """
    if batch % (world * parts):
        pieces = f" in {parts} parts each" if parts > 1 else ""
        raise ValueError(
            f"optim.batch={batch} images cannot be shared out over {world} processes{pieces}: "
            f"take a multiple of {world * parts}, such as {-(-batch // (world * parts)) * world * parts}."
        )
    if not len(source):
        raise ValueError("the data source holds no images.")
    part, own = batch // parts, batch // parts // world
    places = [start + rank * own + i for start in range(0, batch, part) for i in range(own)]
    pixels = sum(group.count * group.size**2 for group in (crops.globals, crops.locals)) * len(crops.mean)
    return data_loader(
        TrainDataset(source, crops, masks, seed, batch), Steps(start_step, steps, places), collate, workers,
        pin, batch_bytes=pixels * len(places),  # of 8 bits
    )  # fmt: skip


def view_loader(
    source: ImageSource,
    cut: Transform,
    size: int,
    order: Iterable[list[tuple[int, int]]],
    workers: int,
    channels: int,
) -> Iterable[EvalBatch]:
    """Views of images in the order of the caller: for each batch, (image, number of the draw) of each place.

    `order` is asked for one batch after another. An unreadable image is zeros (channels, size, size).
    """
    blank = partial(_collate_eval, channels=channels, size=size)
    return data_loader(_Views(source, cut), order, blank, workers, pin=False)


class TrainDataset(Dataset[Sample]):
    """The samples of a run, by (step, place).

    Raises:
        ValueError: if crops.decode=reduced and the source has no files to decode.
    """

    def __init__(
        self, source: ImageSource, crops: Crops, masks: BlockMasks | None, seed: int, batch: int
    ) -> None:
        if crops.decode == "reduced" and not hasattr(source, "stored"):
            raise ValueError(
                f"crops.decode=reduced decodes JPEG files, but the source {type(source).__name__} gives "
                f"pictures without files. Set crops.decode=whole, or give the source a method "
                f"stored(index) -> bytes."
            )
        self.source, self.crops, self.masks, self.seed, self.batch = source, crops, masks, seed, batch
        self.cut = MultiCrop(crops)

    def __getitem__(self, at: tuple[int, int]) -> Sample:
        step, place = at
        (global_crops, local_crops), unreadable = self._crops(step, place)
        rng = generator(self.seed, step, place, COLOUR)
        return Sample(
            step=step,
            global_crops=global_crops,
            local_crops=local_crops,
            global_colour=self._colour(self.crops.globals, rng),
            local_colour=self._colour(self.crops.locals, rng),
            masks=self._masks(step, place),
            unreadable=unreadable,
        )

    def _crops(self, step: int, place: int) -> tuple[tuple[Tensor, Tensor], dict[str, str]]:
        unreadable: dict[str, str] = {}
        for index in self._candidates(step, place):
            try:
                rng = generator(self.seed, step, place, CROPS)
                return self.cut(*self.picture(index, rng)), unreadable
            except UNREADABLE as error:
                name = self.source.name(index)
                unreadable[name] = str(error).removeprefix(f"{name} cannot be read: ") or type(error).__name__
        raise RuntimeError(
            f"{len(unreadable)} images in a row cannot be read, the last being "
            f"{', '.join(list(unreadable)[-3:])}: {list(unreadable.values())[-1]}"
        )

    def picture(self, index: int, rng: np.random.Generator) -> tuple[ImageLike, CropBoxes]:
        """An image, decoded, and where in it its crops lie."""
        if self.crops.decode == "reduced":
            source: Any = self.source
            return read_reduced(source.stored(index), source.name(index), self.cut, rng)
        image, _ = self.source[index]
        return image, self.cut.draw(*size_of(image), rng)

    def _candidates(self, step: int, place: int) -> Iterator[int]:
        """The image whose turn it is, then others in case it cannot be read; no image twice."""
        n = len(self.source)
        first = image_at(self.seed, step * self.batch + place, n)
        yield first
        for attempt in range(min(ATTEMPTS, n)):
            other = permute(attempt, n, hash_key(self.seed, step, place))
            if other != first:
                yield other

    def _colour(self, group: CropGroup, rng: np.random.Generator) -> Tensor:
        rows = np.zeros((group.count, augment.COLUMNS), dtype=np.float32)
        for crop in range(group.count):
            rows[crop] = augment.draw(self.crops, group, crop, rng)
        return torch.from_numpy(rows)

    def _masks(self, step: int, place: int) -> Tensor | None:
        if self.masks is None:
            return None
        total = self.crops.globals.count * self.batch
        numbers = range(place, total, self.batch)  # crop-major, as in a batch
        rows = [self.masks(self.seed, step, j, total, generator(self.seed, step, j, MASKS)) for j in numbers]
        return torch.from_numpy(np.stack(rows))


class _Views(Dataset[tuple[int, Tensor | None, int, str]]):
    """Number, view, label and name of each image; no view if the image is unreadable."""

    def __init__(self, source: ImageSource, cut: Transform) -> None:
        self.source, self.cut = source, cut

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, Tensor | None, int, str]:
        index, draw = at
        try:
            image, label = self.source[index]
            return index, self.cut(image, index, draw), label, ""
        except UNREADABLE:
            return index, None, -1, self.source.name(index)


def _collate_eval(rows: Sequence[tuple[int, Tensor | None, int, str]], channels: int, size: int) -> EvalBatch:
    blank = torch.zeros(channels, size, size, dtype=torch.uint8)
    return EvalBatch(
        crops=stack([blank if crop is None else crop for _, crop, _, _ in rows]),
        labels=torch.tensor([label for _, _, label, _ in rows]),
        indices=torch.tensor([index for index, _, _, _ in rows]),
        unreadable=[name for _, crop, _, name in rows if crop is None],
    )
