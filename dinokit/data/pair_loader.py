"""Loader processes for images with maps: the crops of a training, and whole images for a test.

As in dinokit.data.loader, what is random is a function of (seed, step, place), so a training that goes on at
step k sees what an unbroken one would have seen. Every pair counts in a labelled set, and a mask that does
not fit is a mistake to put right: one that cannot be read stops the work with its name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import Pair, to_tensors, to_uint8
from dinokit.data.sampler import generator, image_at
from dinokit.data.sources import ImageLike
from dinokit.data.workers import UNREADABLE, Steps, data_loader

DenseTransform = Callable[[ImageLike, np.ndarray, np.random.Generator], Pair]
PAIR = 3  # stream of random numbers of one place


class PairBatch(NamedTuple):
    """Pairs of a step of training."""

    images: Tensor  # (b, C, H, W) uint8
    targets: Tensor  # (b, H, W): class ids or metres


class WholePair(NamedTuple):
    """A pair as it is stored."""

    number: int  # in the source
    image: Tensor  # (C, H, W) uint8
    target: Tensor  # (H, W)


def training_pairs(
    pairs: DenseSource, cut: DenseTransform, *, seed: int, start: int, steps: int, batch: int,
    rank: int = 0, world: int = 1, workers: int = -1,
) -> Iterator[PairBatch]:  # fmt: skip
    """This process's part of the batches of steps `start` to `steps` - 1.

    Args:
        pairs: images with maps.
        cut: makes of one what a step is shown, all in one size.
        seed: of everything random.
        start: the first step.
        steps: the step to stop before.
        batch: images a step over all processes.
        rank: the number of this process, of `world`.
        world: the number of processes.
        workers: as in `dinokit.data.workers`.

    Raises:
        ValueError: if the batch cannot be shared out; while iterating, if a pair cannot be read.
    """
    if batch % world:
        raise ValueError(f"batch={batch} images cannot be shared out over {world} processes.")
    places = range(rank * (batch // world), (rank + 1) * (batch // world))
    dataset = _Cuts(pairs, cut, seed, batch)
    for rows in data_loader(dataset, Steps(start, steps, places), list, workers, pin=False):
        good = [_checked(row) for row in rows]
        yield PairBatch(torch.stack([row[0] for row in good]), torch.stack([row[1] for row in good]))


def whole_pairs(pairs: DenseSource, indices: Sequence[int], workers: int = -1) -> Iterator[WholePair]:
    """Pairs by number, one at a time, in that order.

    Raises:
        ValueError: while iterating, if a pair cannot be read.
    """
    order: Iterable[list[Any]] = [[index] for index in indices]
    for rows in data_loader(_Wholes(pairs), order, list, workers, pin=False):
        yield WholePair(*_checked(rows[0]))


class _Cuts(Dataset[tuple[Any, ...] | str]):
    def __init__(self, pairs: DenseSource, cut: DenseTransform, seed: int, batch: int) -> None:
        self.pairs, self.cut, self.seed, self.batch = pairs, cut, seed, batch

    def __getitem__(self, at: tuple[int, int]) -> tuple[Any, ...] | str:
        step, place = at
        index = image_at(self.seed, step * self.batch + place, len(self.pairs))
        try:
            image, target = self.pairs[index]
        except UNREADABLE as error:
            return _complaint(error, self.pairs.name(index))
        return self.cut(image, target, generator(self.seed, step, place, PAIR))


class _Wholes(Dataset[tuple[Any, ...] | str]):
    def __init__(self, pairs: DenseSource) -> None:
        self.pairs = pairs

    def __getitem__(self, index: int) -> tuple[Any, ...] | str:
        try:
            image, target = to_tensors(*self.pairs[index])
        except UNREADABLE as error:
            return _complaint(error, self.pairs.name(index))
        return index, to_uint8(image), target


def _complaint(error: BaseException, name: str) -> str:
    """An error as text: raised in a worker, it would reach the user as the worker's traceback."""
    text = str(error) or type(error).__name__
    return text if name in text else f"{name}: {text}"


def _checked(row: tuple[Any, ...] | str) -> tuple[Any, ...]:
    if isinstance(row, str):
        raise ValueError(row)
    return row
