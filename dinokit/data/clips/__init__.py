"""Short videos with a class each. A registry: a file here is a layout on disk, or a generator.

A file defines `Config`, a dataclass with a field `split`, one of "auto", "train" and "test", and

    build(cfg: Config) -> Clips

Opening must be cheap: frames are read on access. Evaluators set a split "auto" to that of the section.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Clip(Protocol):
    """One clip, frame by frame."""

    @property
    def name(self) -> str:
        """What a person would look for on disk, for messages."""
        ...

    @property
    def label(self) -> int:
        """Its class."""
        ...

    def __len__(self) -> int:
        """The number of frames, 1 or more.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        ...

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """These frames (n, H, W, 3) uint8, in this order; an index may be there twice.

        Raises:
            OSError, ValueError: if they cannot be read.
        """
        ...

    def seconds(self, indices: Sequence[int]) -> list[float]:
        """When these frames are shown, in ascending order of the frames, from any start.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        ...


@dataclass(frozen=True)
class Clips:
    """The clips of one split.

    `changed` says what a clip becomes when it is shown "backwards", "mirrored" (left and right exchanged) or
    "flipped" (up and down exchanged): the class that each class becomes. What is not in it is not known.
    """

    classes: tuple[str, ...]  # names by label
    clips: Sequence[Clip]
    changed: dict[str, tuple[int, ...]] = field(default_factory=dict)


def split_of(split: str) -> str:
    """The split to open; "auto", where no evaluator has set it, is the test."""
    return "test" if split == "auto" else split


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key to sort names by the numbers in them: frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts)
