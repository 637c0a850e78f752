"""Dense datasets: images with a map of the class or the depth of every pixel. A registry: a file is a layout.

A file defines `Config`, a dataclass with a field `split`, one of "all", "train", "test", and

    build(cfg: Config) -> DenseSource

A Config with a field `target` reads either map, "mask" or "depth"; the evaluator sets it. Opening must be
cheap, and a DenseSource must pickle (loader processes receive a copy).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dinokit.data.decode import ImageLike

IGNORE = -1  # the class id of pixels that are not evaluated


class DenseSource(Protocol):
    """Images with a map each, by number, in an order that never changes."""

    classes: Sequence[str]  # names by id; empty for depth maps

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        """The decoded image and its map (H, W), of the image's size.

        The map is int16 with class ids, IGNORE where pixels are not evaluated; or float32 with metres, 0
        where there is no depth.

        Raises:
            OSError, ValueError: if either cannot be read, their sizes differ, or an id is not a class.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...
