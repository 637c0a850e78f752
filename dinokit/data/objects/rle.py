"""Masks as run lengths, in the form of COCO's files.

The pixels of a mask are read column by column; the runs of equal pixels alternate, beginning with zeros. A
mask that begins with a one has a first run of length 0. Files have the runs as a list, or as a string of
printable characters: 5 bits a character, so that a typical run takes one or two.

Written here, and not taken from pycocotools, because every mask of every layout has this form, and that
package is compiled; a test compares the two where it is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_SHIFT = 60  # bits of a run in a string: no mask has longer ones, and very long ones take for ever


@dataclass(frozen=True, eq=False)
class Rle:
    """The runs of a mask."""

    size: tuple[int, int]  # height, width
    counts: np.ndarray  # (runs,) int64, their sum is height * width; even places are zeros

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.counts[1::2].sum())


def encode(mask: np.ndarray) -> Rle:
    """The runs of a mask (H, W) bool."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
    starts = np.concatenate([[0], edges, [flat.size]])
    return Rle((mask.shape[0], mask.shape[1]), np.diff(starts).astype(np.int64))


def decode(rle: Rle) -> np.ndarray:
    """The mask (H, W) bool of runs."""
    values = np.arange(len(rle.counts)) % 2 == 1
    return np.repeat(values, rle.counts).reshape(rle.size, order="F")


def to_json(rle: Rle) -> dict[str, Any]:
    """As files store it: {"size": [H, W], "counts": a string}."""
    return {"size": [int(side) for side in rle.size], "counts": _to_text(rle.counts)}


def from_json(value: Mapping[str, Any], name: str) -> Rle:
    """The runs that a file stores, as a list or as a string.

    Raises:
        ValueError: with `name`, if it holds no mask of its size.
    """
    try:
        height, width = (int(side) for side in value["size"])
        counts = value["counts"]
        numbers = _from_text(counts) if isinstance(counts, str) else [int(n) for n in counts]
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(
            f"{name} has a mask that is no run lengths: it needs `size`, height and width, and `counts`."
        ) from None
    total = sum(numbers)  # of integers without a limit, which cannot begin again at 0 as those of numpy
    if min(height, width, *numbers) < 0 or total != height * width or total >= 1 << 62:
        raise ValueError(f"{name}: the runs of a mask of {height} x {width} pixels add up to {total}.")
    return Rle((height, width), np.array(numbers, dtype=np.int64))


def _to_text(counts: np.ndarray) -> str:
    """Each run, from the fourth on less the one two before it, in groups of 5 bits, the low ones first."""
    letters = []
    for place, run in enumerate(counts.tolist()):
        value = run - int(counts[place - 2]) if place > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)  # bit 16 is the sign
            letters.append(chr(48 + (bits | 32 if more else bits)))
    return "".join(letters)


def _from_text(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > MAX_SHIFT:
            raise ValueError(letter)
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs
