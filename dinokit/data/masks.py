"""Block masks: the patches of a global crop that are hidden from the student.

Random rectangles are added until the target number of patches is masked (BEiT, arXiv 2106.08254, algorithm 1,
with the limits of DINOv2, arXiv 2304.07193). The target numbers are spread evenly over the whole step: the
range `masks.patches` is divided into as many intervals as there are masked crops, one for each of them.

A mask is the bits of one integer (patch i is bit i), so adding and counting a rectangle takes a few integer
operations; it becomes a numpy array once, at the end.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dinokit.config.load import Masks
from dinokit.data.sampler import hash_key, permute

ATTEMPTS = 10  # rectangles tried before a mask stays as it is
MIN_AREA = 4.0  # patches in a rectangle
MAX_SHARE = 0.5  # of the grid in one rectangle
LOG_RATIO = math.log(0.3), -math.log(0.3)  # of height / width of a rectangle


class BlockMasks:
    """Masks over a grid of (rows, columns) patches, one for each global crop of a step.

    Raises:
        ValueError: if the grid is too small for a rectangle, or for shares of `masks` outside [0, 1].
    """

    def __init__(self, cfg: Masks, grid: tuple[int, int]) -> None:
        (rows, columns), (low, high) = grid, cfg.patches
        if not (0 <= cfg.images <= 1 and 0 <= low <= high <= 1):
            raise ValueError(
                f"masks.images={cfg.images} and masks.patches=[{low}, {high}] are shares: they must be "
                f"in [0, 1], the smaller one of a pair first."
            )
        if min(grid) < 3 or rows * columns * high < 1:
            raise ValueError(
                f"crops.globals.size over the patch size gives a grid of {rows} x {columns} patches, but "
                f"masks.patches=[{low}, {high}] needs 3 x 3 and one patch to mask. Increase the size, use a "
                f"smaller patch, increase masks.patches, or set masks=null."
            )
        self.cfg, self.grid = cfg, grid
        # One column of h patches, as bits; multiplied by the bits of a row, it is a rectangle.
        self._columns = [sum(1 << columns * row for row in range(height)) for height in range(rows)]

    def __call__(
        self, seed: int, step: int, number: int, total: int, rng: np.random.Generator
    ) -> NDArray[np.bool_]:
        """The mask of global crop `number` of the `total` in this step, over all processes. Returns (N,).

        `seed` and `step` shuffle the intervals, so each crop finds its own without communication. `rng` draws
        the rectangles.
        """
        masked = int(total * self.cfg.images)
        interval = permute(number, total, hash_key(seed, step))
        cells = self.grid[0] * self.grid[1]
        bits = 0
        if interval < masked:
            low, high = self.cfg.patches
            share = low + (high - low) * (interval + rng.random()) / masked
            bits = self._draw_mask(int(cells * share), rng)
        packed = np.frombuffer(bits.to_bytes(-(-cells // 8), "little"), dtype=np.uint8)
        return np.unpackbits(packed, count=cells, bitorder="little").astype(bool)

    def _draw_mask(self, target: int, rng: np.random.Generator) -> int:
        """Rectangles until `target` patches are masked, never more; fewer if ten attempts in a row fail."""
        bits = count = 0
        draws = _uniform(rng)
        while count < target:
            room = min(target - count, MAX_SHARE * self.grid[0] * self.grid[1])
            for _ in range(ATTEMPTS):
                rectangle = self._rectangle(room, draws)
                new = (rectangle & ~bits).bit_count()
                if 0 < new <= room:
                    bits |= rectangle
                    count += new
                    break
            else:
                break
        return bits

    def _rectangle(self, room: float, draws: Iterator[float]) -> int:
        """A rectangle of about 4 to `room` patches, or 0 if it would span the grid."""
        rows, columns = self.grid
        area = MIN_AREA + (room - MIN_AREA) * next(draws)  # also if room is below 4
        ratio = math.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * next(draws))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= rows or width >= columns:
            return 0
        top, left = int((rows - height + 1) * next(draws)), int((columns - width + 1) * next(draws))
        return ((1 << width) - 1) * self._columns[height] << top * columns + left


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1), drawn from numpy 64 at a time: a single draw costs as much as a rectangle."""
    while True:
        yield from rng.random(64).tolist()
