"""Pairs of images with points that correspond. A registry: a file here is a layout on disk.

A file defines `Config`, a dataclass with a field `split`, one of "train", "test", and

    build(cfg: Config) -> PairSource

Opening must be cheap: images are read on access.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dinokit.data.decode import ImageLike


@dataclass(frozen=True)
class Pair:
    """Two images and n points that are visible in both."""

    first: ImageLike
    second: ImageLike
    points: (
        np.ndarray
    )  # (2, n, 2) float64: x and y of each point in the first and the second image, in pixels
    sides: np.ndarray  # (n,) float64: the longer side of the box of the point's object in the second image


class PairSource(Protocol):
    """Pairs by number, in an order that never changes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """A pair; it may have no point.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...
