"""Block masks: which patches of a global crop the student must guess.

Rectangles are laid one over another until the wanted number of patches is covered (BEiT, arXiv 2106.08254,
algorithm 1, with the limits of DINOv2, arXiv 2304.07193). How many a crop should have is spread evenly over
the whole step: the masked crops are shuffled into as many slices of the range `masks.patches`, one each.

A mask is a set of patches, kept as the bits of one integer (patch i is bit i): a rectangle is then laid,
counted and taken back in a few integer operations, and numpy is met once, at the end.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dinokit.config.load import Masks
from dinokit.data.sampler import hash_key, permute

ATTEMPTS = 10  # boxes tried before a mask stays as it is
LEAST_AREA = 4.0  # patches in a box
LARGEST_SHARE = 0.5  # of the grid in one box
LOG_RATIO = math.log(0.3), -math.log(0.3)  # of a box's height over its width


class BlockMasks:
    """Masks over a grid of (rows, columns) patches, one for each global crop of a step.

    Raises:
        ValueError: if the grid is too small to lay a box in, or for shares of `masks` outside [0, 1].
    """

    def __init__(self, cfg: Masks, grid: tuple[int, int]) -> None:
        (rows, columns), (low, high) = grid, cfg.patches
        if not (0 <= cfg.images <= 1 and 0 <= low <= high <= 1):
            raise ValueError(
                f"masks.images={cfg.images} and masks.patches=[{low}, {high}] are shares: they lie in "
                f"[0, 1], and the first of a pair is the smaller."
            )
        if min(grid) < 3 or rows * columns * high < 1:
            raise ValueError(
                f"crops.globals.size over the patch size gives a grid of {rows} x {columns} patches, but "
                f"masks.patches=[{low}, {high}] needs 3 x 3 and one of them to hide. Raise the size, take a "
                f"smaller patch, raise masks.patches, or drop the masks with masks=null."
            )
        self.cfg, self.grid = cfg, grid
        # One column of h patches, as bits; times the bits of a row, it is a box.
        self._columns = [sum(1 << columns * row for row in range(height)) for height in range(rows)]

    def __call__(
        self, seed: int, step: int, number: int, total: int, rng: np.random.Generator
    ) -> NDArray[np.bool_]:
        """The mask of global crop `number` of the `total` in this step, over all processes. Returns (N,).

        `seed` and `step` shuffle the slices: each crop finds its own without asking the others. `rng` draws.
        """
        masked = int(total * self.cfg.images)
        place = permute(number, total, hash_key(seed, step))
        cells = self.grid[0] * self.grid[1]
        bits = 0
        if place < masked:
            low, high = self.cfg.patches
            share = low + (high - low) * (place + rng.random()) / masked
            bits = self._lay(int(cells * share), rng)
        packed = np.frombuffer(bits.to_bytes(-(-cells // 8), "little"), dtype=np.uint8)
        return np.unpackbits(packed, count=cells, bitorder="little").astype(bool)

    def _lay(self, wanted: int, rng: np.random.Generator) -> int:
        """Boxes until `wanted` patches are covered, never more; fewer if none of ten fits what is missing."""
        bits = count = 0
        draws = _uniform(rng)
        while count < wanted:
            room = min(wanted - count, LARGEST_SHARE * self.grid[0] * self.grid[1])
            for _ in range(ATTEMPTS):
                box = self._box(room, draws)
                new = (box & ~bits).bit_count()
                if 0 < new <= room:
                    bits |= box
                    count += new
                    break
            else:
                break
        return bits

    def _box(self, room: float, draws: Iterator[float]) -> int:
        """One box of about 4 to `room` patches, or nothing (0) if it would span the grid."""
        rows, columns = self.grid
        area = LEAST_AREA + (room - LEAST_AREA) * next(draws)  # room may be below 4: then between the two
        ratio = math.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * next(draws))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= rows or width >= columns:
            return 0
        top, left = int((rows - height + 1) * next(draws)), int((columns - width + 1) * next(draws))
        return ((1 << width) - 1) * self._columns[height] << top * columns + left


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1), drawn from numpy in handfuls: one at a time costs as much as laying a box."""
    while True:
        yield from rng.random(64).tolist()
