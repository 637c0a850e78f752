"""Videos with masks of objects in every frame. A registry: a file here is a layout on disk.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> list[Video]

Opening must be cheap: frames and masks are read on access. A field `split`, if there is one, is set to "test"
by evaluators.
"""

from typing import Protocol

import numpy as np

from dinokit.data.sources import ImageLike


class Video(Protocol):
    """One video, frame by frame."""

    @property
    def name(self) -> str:
        """Unique in the data set."""
        ...

    def __len__(self) -> int:
        """The number of frames, 3 or more."""
        ...

    def frame(self, index: int, channels: int) -> ImageLike:
        """The decoded image.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        ...

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8, as large as the frame: 0 background, then the objects, from 1.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        ...
