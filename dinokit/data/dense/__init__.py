"""Images with a map: the class or the depth of every pixel. A shelf: a file here is a layout on disk.

A file defines `Config`, a dataclass with a field `split`, one of "all", "train", "test", and

    build(cfg: Config) -> DenseSource

A Config with a field `target` reads either map, "mask" or "depth"; the evaluator sets it. Opening must be
cheap, and DenseSource must pickle (loader processes receive a copy).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dinokit.data.sources import ImageLike

IGNORE = -1  # the class id of a pixel that is not judged


class DenseSource(Protocol):
    """Images with a map each, by number, in an order that is the same every time."""

    classes: Sequence[str]  # names by id; empty where the maps are depths

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        """The image, decoded, and its map (H, W), as large as the image.

        The map is int16 with class ids, IGNORE where nothing is judged; or float32 with metres, 0 where there
        is no reading.

        Raises:
            OSError, ValueError: if either cannot be read, their sizes differ, or an id is not a class.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...
