"""Order of the images and random numbers of a run, as functions of (seed, step, place) without any state.

So a run that stops and resumes sees the same as an uninterrupted run, for any number of workers or processes.

    place     number of an image in its step's global batch
    position  step * batch + place: images counted from the start of the run
    pass      position // n for n images: one epoch over the data set
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

ROUNDS = 16  # with 12, some orders of six images are still more frequent than others
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: multiples of it never repeat


def generator(seed: int, step: int, place: int, stream: int) -> np.random.Generator:
    """Random numbers of one place of one step; each `stream` of a place has its own.

    Philox encrypts a counter, so generators that differ in any of the four numbers never share a part of
    their sequences (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). It costs about 10
    microseconds.
    """
    counter = np.array([0, 0, place, step], dtype=np.uint64)  # the two low words count the draws
    return np.random.Generator(np.random.Philox(key=(seed & MASK) << 64 | stream, counter=counter))


def hash_key(*numbers: int) -> int:
    """A 64-bit hash of integers; similar numbers get unrelated keys."""
    key = 0
    for number in numbers:
        key = _mix((key ^ _mix(int(number) & MASK)) + GOLDEN & MASK)
    return key


def permute(index: int, n: int, key: int) -> int:
    """The image of `index` under a permutation of range(n) chosen by `key`; needs no memory and no set-up.

    A Feistel network over a grid of at least n cells, with modular sums so that the grid need not be square;
    a result outside range(n) is permuted again, so that the whole stays a permutation (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains", section 5).

    Raises:
        ValueError: if index is not in range(n).
    """
    if not 0 <= index < n:
        raise ValueError(f"index={index} is not in range({n}).")
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    index, start = int(index), hash_key(key)
    while True:
        row, column = divmod(index, columns)
        state = start
        for _ in range(ROUNDS // 2):
            row = (row + _mix(state ^ column)) % rows
            column = (column + _mix(state + GOLDEN & MASK ^ row)) % columns
            state = state + 2 * GOLDEN & MASK
        index = row * columns + column
        if index < n:
            return index


def image_at(seed: int, position: int, n: int) -> int:
    """The image, of n, at a position of the run: each comes once in a pass, in an order of that pass."""
    number, index = divmod(position, n)
    return permute(index, n, hash_key(seed, number))


def process_places(batch: int, rank: int, world: int, accumulation: int = 1, key: str = "batch") -> list[int]:
    """The places of a step's global batch that this process loads.

    A process takes an equal share of each of `accumulation` consecutive micro-batches, so the images of a
    micro-batch, over all processes, do not depend on the number of processes.

    Args:
        batch: images in a step over all processes.
        rank: the number of this process, of `world`.
        world: the number of processes.
        accumulation: the number of micro-batches in a step.
        key: of the batch in a recipe, for the message.

    Raises:
        ValueError: if the batch cannot be divided equally.
    """
    shares = world * accumulation
    if batch % shares:
        micro = f" with {accumulation} micro-batches each" if accumulation > 1 else ""
        raise ValueError(
            f"{key}={batch} images cannot be divided among {world} processes{micro}: "
            f"use a multiple of {shares}, such as {-(-batch // shares) * shares}."
        )
    micro_batch, share = batch // accumulation, batch // shares
    return [start + rank * share + i for start in range(0, batch, micro_batch) for i in range(share)]


class StepSampler:
    """The batches of training: for each step, (step, place) of the places that this process loads."""

    def __init__(self, start: int, stop: int, places: Sequence[int]) -> None:
        self.steps, self.places = range(start, stop), places

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(step, place) for place in self.places] for step in self.steps)


class RangeSampler:
    """Batches of (index, draw) over ranges of images in order; no batch spans two ranges.

    Batches are made one by one, because there may be millions of images.
    """

    def __init__(self, ranges: Sequence[range], batch: int, draw: int = 0) -> None:
        self.ranges, self.batch, self.draw = ranges, batch, draw

    def __len__(self) -> int:
        return sum(-(-len(indices) // self.batch) for indices in self.ranges)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.ranges:
            for start in range(0, len(indices), self.batch):
                yield [(index, self.draw) for index in indices[start : start + self.batch]]


def _mix(x: int) -> int:
    """A bijection of 64-bit numbers; every bit of x changes every bit (Steele et al. 2014, SplitMix)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
