"""Embeddings that stay on disk: rows on the unit sphere, read a piece at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

CHUNK = 65_536  # rows at a time: 100 MB of width 384
Part = Path | np.ndarray


class Vectors:
    """Rows (n, D) of `.npy` files or arrays laid end to end, or some of these rows.

    Args:
        parts: each (m, D), of any float type; files are memory-mapped when they are touched.
        rows: which of them, ascending; None: all.
        unit: whether to put each row on the unit sphere.
    """

    def __init__(self, parts: Sequence[Part], rows: np.ndarray | None = None, unit: bool = True) -> None:
        self.parts, self.rows, self.unit = list(parts), rows, unit
        shapes = [_open(part).shape for part in self.parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"Embeddings must be arrays (n, D) of one width; there is: {shapes[:4]}.")
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        self.width = int(shapes[0][1])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.rows is None else len(self.rows)

    def at(self, places: np.ndarray) -> "Vectors":
        """Only the rows at `places`, ascending places among these."""
        return Vectors(self.parts, places if self.rows is None else self.rows[places], self.unit)

    def take(self, places: np.ndarray) -> np.ndarray:
        """(len(places), D) float32, in the order asked for."""
        places = np.asarray(places) if self.rows is None else self.rows[places]
        if len(self.parts) == 1 and (places[1:] >= places[:-1]).all():
            return self._placed(_open(self.parts[0])[places].astype(np.float32))
        done = np.empty((len(places), self.width), np.float32)
        which = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(which):
            here = np.flatnonzero(which == number)
            inside = places[here] - self._starts[number]
            order = np.argsort(inside, kind="stable")  # a file is read from its beginning to its end
            done[here[order]] = _open(self.parts[number])[inside[order]]
        return self._placed(done)

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        """The place of the first row, and (m, D) float32, for all rows in order."""
        for start in range(0, len(self), size):
            yield start, self.chunk(start, size)

    def chunk(self, start: int, size: int = CHUNK) -> np.ndarray:
        """(m, D) float32: `size` rows from `start` on, or as many as there are."""
        stop = min(start + size, len(self))
        if self.rows is not None:
            return self.take(np.arange(start, stop))
        done = np.empty((stop - start, self.width), np.float32)
        begin = int(np.searchsorted(self._starts, start, side="right")) - 1
        end = int(np.searchsorted(self._starts, stop, side="left"))
        for number in range(begin, end):
            first, last = int(self._starts[number]), int(self._starts[number + 1])
            low, high = max(first, start), min(last, stop)
            done[low - start : high - start] = _open(self.parts[number])[low - first : high - first]
        return self._placed(done)

    def broken(self) -> np.ndarray:
        """(n,) bool: rows that have no direction: not finite, or zero."""
        bare = Vectors(self.parts, self.rows, unit=False)
        found = np.zeros(len(self), np.bool_)
        for start, x in bare.chunks():
            length = np.einsum("ij,ij->i", x, x)
            found[start : start + len(x)] = ~np.isfinite(length) | (length == 0)
        return found

    def _placed(self, x: np.ndarray) -> np.ndarray:
        if self.unit:
            length = np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
            x /= np.where(length > 0, length, 1)
        return x


def _open(part: Part) -> np.ndarray:
    return part if isinstance(part, np.ndarray) else np.load(part, mmap_mode="r")
