"""What is random is a function of (seed, step, place): which image comes, and every draw made for it.

Nothing here has a state that moves on. So a run that stops and goes on sees what an unbroken run would have
seen, whatever the number of workers or processes.

    place     number of an image in its step's global batch
    position  step * batch + place: images counted from the start of the run
    pass      position // n for n images: one reading of the whole data set
"""

import math

import numpy as np

ROUNDS = 16  # with 12, six images still come in some orders more often than in others
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: steps of it never repeat


def generator(seed: int, step: int, place: int, stream: int) -> np.random.Generator:
    """Random numbers that belong to one place of one step; each `stream` of a place has its own.

    Philox encrypts a counter, so generators with any difference in the four numbers never share a part of
    their sequences (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). It costs about 10
    microseconds.
    """
    counter = np.array([0, 0, place, step], dtype=np.uint64)  # the two low words count the draws
    return np.random.Generator(np.random.Philox(key=(seed & MASK) << 64 | stream, counter=counter))


def hash_key(*numbers: int) -> int:
    """A key of 64 bits from any whole numbers, in which nothing of their order or nearness is left."""
    key = 0
    for number in numbers:
        key = _mix((key ^ _mix(int(number) & MASK)) + GOLDEN & MASK)
    return key


def permute(index: int, n: int, key: int) -> int:
    """Where `index` goes under the permutation of range(n) that `key` names. Takes no memory and no set-up.

    A Feistel network over a grid of at least n cells, with modular sums so that the grid need not be square;
    what lands outside range(n) is sent through again, which keeps it a permutation (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 5).

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
    """The image, of n, at a position of the run: each comes once a pass, in an order of that pass's own."""
    number, index = divmod(position, n)
    return permute(index, n, hash_key(seed, number))


def _mix(x: int) -> int:
    """A bijection of 64 bits in which every bit of x moves every bit (Steele et al. 2014, SplitMix)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
