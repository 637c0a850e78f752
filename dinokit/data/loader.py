"""Data loaders: one construction for training batches, whole images, and images with maps.

`build_loader` sets up worker processes, memory and signals. The functions below it choose the dataset and the
order: `training_loader`, `image_loader`, `dense_training_loader` and `dense_loader`. Batches do not depend on
the number of workers, because all random numbers are a function of (seed, step, place).

b  images of a batch     C  channels     h, w  pixels of an image
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinokit.config.load import Crops
from dinokit.data.batch import Batch, TrainDataset, collate, stack
from dinokit.data.decode import UNREADABLE, ImageLike
from dinokit.data.dense import DenseSource
from dinokit.data.masks import BlockMasks
from dinokit.data.sampler import StepSampler, generator, image_at, process_places
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import Transform, to_tensor, to_uint8
from dinokit.runtime.distributed import cpu_cores, memory

MAX_WORKERS = 16
PREFETCH_MEMORY = 0.25  # share of this process's memory that waiting batches may take
DENSE = 3  # stream of random numbers of one place, after those of dinokit.data.batch

DenseTransform = Callable[[ImageLike, np.ndarray, np.random.Generator], tuple[Tensor, Tensor]]


def build_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    collate_fn: Callable[[Any], Any],
    workers: int,
    pin: bool = False,
    batch_bytes: int = 0,
) -> DataLoader[Any]:
    """A DataLoader that leaves torch's global random state unchanged. Its workers ignore signals.

    Args:
        dataset: makes an item from a key; picklable.
        batches: the keys of each batch, in order.
        collate_fn: makes a batch from items; picklable.
        workers: processes; 0: load in this process; -1: one per core but one, at most 16, and fewer if their
            batches would fill the memory.
        pin: whether to put batches into page-locked memory, for a GPU.
        batch_bytes: size of a batch. Waiting batches then take at most PREFETCH_MEMORY of the memory, but at
            least one batch per worker.
    """
    most = int(memory() * PREFETCH_MEMORY) // batch_bytes if batch_bytes else sys.maxsize  # batches
    if workers < 0:
        workers = min(MAX_WORKERS, cpu_cores() - 1, max(most, 1))
    prefetch = 2 if 2 * workers <= most else 1  # batches per worker
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # else it would draw from torch's global generator, and change training
    )


def _leave_signals_to_parent(_: int) -> None:
    """Make a worker ignore Ctrl-C and a scheduler's warning, which reach every process of a job at once.

    The parent handles them, and still needs batches to stop in order. A SIGTERM from the parent ends the
    worker: Python sends it to each child at exit, and then waits for it.

    A worker does not print either. Ctrl-C may interrupt the parent while it receives a tensor; the thread of
    the worker that sends it then has a broken connection, which it would show by sys.excepthook. Nothing else
    in a worker uses that: errors of a dataset are sent to the parent.
    """
    sys.excepthook = lambda *_: None
    for name in {"SIGINT", "SIGUSR1", "SIGUSR2"} & signal.Signals.__members__.keys():  # Windows has the first
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none; there, any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, args=(os.getppid(),), daemon=True).start()


def _exit_on_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def training_loader(
    source: ImageSource, crops: Crops, masks: BlockMasks | None, *, seed: int, start_step: int, steps: int,
    batch: int, rank: int = 0, world: int = 1, accumulation: int = 1, workers: int = -1, pin: bool = False,
    places: Sequence[int] = (),
) -> Iterable[Batch]:  # fmt: skip
    """This process's share of the batches of steps `start_step` to `steps` - 1.

    Args:
        source: the images. An unreadable one is named in its batch, and another takes its place.
        crops: how they are cropped and coloured.
        masks: None if no loss needs them.
        seed: of all random numbers.
        start_step: the first step.
        steps: the length of the whole run: the step to stop before.
        batch: images in a step over all processes.
        rank: the number of this process, of `world`.
        world: the number of processes.
        accumulation: micro-batches that Batch.split() will make of a batch.
        workers: as in build_loader.
        pin: as in build_loader.
        places: of the batch that this process loads; empty: its equal share.

    Raises:
        ValueError: if the batch cannot be divided equally, the source is empty, or as TrainDataset.
        RuntimeError: while iterating, if a worker dies (or ConnectionError, if it dies while it sends a
            batch), or if no readable image is found for a place.
    """
    places = places or process_places(batch, rank, world, accumulation, "optim.batch")
    if not len(source):
        raise ValueError("the data source has no images.")
    pixels = max(pixels_of(variant) for variant in crops.variants) * len(crops.mean)
    dataset = TrainDataset(source, crops, masks, seed, batch)
    sampler = StepSampler(start_step, steps, places)
    return build_loader(dataset, sampler, collate, workers, pin, batch_bytes=pixels * len(places))


def pixels_of(crops: Crops) -> int:
    """Pixels of all crops of an image, of one channel."""
    large, small = crops.globals, crops.locals
    return large.count * (large.size**2 + crops.gram_size**2) + small.count * small.size**2


@dataclass
class ImageBatch:
    """Images of one batch of an evaluation or extraction; those of one shape are stacked."""

    indices: Tensor  # (b,) int64: the images' numbers in the source
    labels: Tensor  # (b,) int64; -1 without one, and where the image is unreadable
    valid: Tensor  # (b,) bool: whether the image could be read
    groups: list[tuple[Tensor, Tensor]]  # images (g, C, h, w), uint8 or float32, and their places (g,) in b
    unreadable: list[str]  # names of the unreadable images
    errors: list[str]  # a sentence about each of them

    @property
    def images(self) -> Tensor:
        """The readable images (v, C, h, w), in order, if they all have one shape and there are any."""
        if len(self.groups) != 1:
            raise ValueError(f"the batch has images of {len(self.groups)} shapes; use its groups.")
        return self.groups[0][0]


def image_loader(
    source: ImageSource,
    transform: Transform,
    batches: Iterable[list[tuple[int, int]]],
    workers: int,
    pin: bool = False,
) -> Iterable[ImageBatch]:
    """Transformed images of a source; an unreadable one is named in its batch, and has no pixels there.

    `transform` is applied to (image, index, draw); `batches` has (index, draw) of the images of each batch,
    such as a RangeSampler, and a generator is advanced batch by batch. `workers` and `pin` are as in
    build_loader.
    """
    read = partial(_read_image, transform)
    return build_loader(_ReadDataset(source, read), batches, _collate_images, workers, pin)


class DenseBatch(NamedTuple):
    """Images with maps of a training step."""

    images: Tensor  # (b, C, h, w) uint8
    targets: Tensor  # (b, h, w): class ids, or metres


@dataclass
class DenseSample:
    """One image with its map, at the stored size."""

    index: int  # in the source
    image: Tensor  # (C, h, w) uint8
    target: Tensor  # (h, w)


def dense_training_loader(
    source: DenseSource, transform: DenseTransform, *, seed: int, start_step: int, steps: int, batch: int,
    rank: int = 0, world: int = 1, workers: int = -1,
) -> Iterator[DenseBatch]:  # fmt: skip
    """This process's share of the batches of steps `start_step` to `steps` - 1, for training a dense head.

    The arguments are those of training_loader; `transform` makes an image and a map of one size for all. An
    unreadable image stops the work, because in a labelled set each counts, and a mask that does not fit its
    image is a mistake to correct.

    Raises:
        ValueError: if the batch cannot be divided equally; while iterating, if an image or map is unreadable.
    """
    places, n = process_places(batch, rank, world), len(source)
    batches = (
        [(image_at(seed, step * batch + place, n), step, place) for place in places]
        for step in range(start_step, steps)
    )
    dataset = _ReadDataset(source, partial(_read_augmented, transform, seed))
    for items in build_loader(dataset, batches, list, workers):
        _refuse_unreadable(items)
        images, targets = zip(*((item.image, item.target) for item in items), strict=True)
        yield DenseBatch(torch.stack(images), torch.stack(targets))


def dense_loader(source: DenseSource, indices: Sequence[int], workers: int = -1) -> Iterator[DenseSample]:
    """Images with maps, one at a time, in the order of `indices`.

    Raises:
        ValueError: while iterating, if an image or a map is unreadable.
    """
    batches = ([(index,)] for index in indices)
    for items in build_loader(_ReadDataset(source, _read_dense), batches, list, workers):
        _refuse_unreadable(items)
        yield DenseSample(items[0].index, items[0].image, items[0].target)


@dataclass
class _Item:
    """One image with its target; without them, and with an error, if it is unreadable."""

    index: int
    image: Any  # Tensor (C, h, w), or None
    target: Any  # label, or Tensor (h, w), or None
    name: str  # if it is unreadable
    error: str  # a sentence with its name; raised in a worker, it would reach the user as a traceback


class _ReadDataset(Dataset[_Item]):
    """Items of a source, by keys whose first element is the index, after `read(image, target, key)`."""

    def __init__(
        self, source: ImageSource | DenseSource, read: Callable[[Any, Any, Any], tuple[Tensor, Any]]
    ) -> None:
        self.source, self.read = source, read

    def __getitem__(self, key: tuple[int, ...]) -> _Item:
        index = key[0]
        try:
            image, target = self.source[index]
            return _Item(index, *self.read(image, target, key), "", "")
        except UNREADABLE as error:
            name, text = self.source.name(index), str(error) or type(error).__name__
            return _Item(index, None, None, name, text if name in text else f"{name}: {text}")


def _read_image(
    transform: Transform, image: ImageLike, label: int, key: tuple[int, int]
) -> tuple[Tensor, int]:
    return transform(image, *key), label


def _read_augmented(
    transform: DenseTransform, seed: int, image: ImageLike, target: np.ndarray, key: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    _, step, place = key
    return transform(image, target, generator(seed, step, place, DENSE))


def _read_dense(image: ImageLike, target: np.ndarray, _: tuple[int]) -> tuple[Tensor, Tensor]:
    pixels = to_tensor(image)[0].contiguous()
    pixels = pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)
    return pixels, torch.from_numpy(np.ascontiguousarray(target))


def _refuse_unreadable(items: Sequence[_Item]) -> None:
    for item in items:
        if item.error:
            raise ValueError(item.error)


def _collate_images(items: Sequence[_Item]) -> ImageBatch:
    shapes: dict[torch.Size, list[int]] = {}
    for place, item in enumerate(items):
        if item.image is not None:
            shapes.setdefault(item.image.shape, []).append(place)
    return ImageBatch(
        indices=torch.tensor([item.index for item in items], dtype=torch.int64),
        labels=torch.tensor([-1 if item.image is None else item.target for item in items], dtype=torch.int64),
        valid=torch.tensor([item.image is not None for item in items], dtype=torch.bool),
        groups=[
            (stack([items[i].image for i in places]), torch.tensor(places)) for places in shapes.values()
        ],
        unreadable=[item.name for item in items if item.image is None],
        errors=[item.error for item in items if item.image is None],
    )
