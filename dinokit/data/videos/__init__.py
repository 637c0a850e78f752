"""Videos whose objects are known in every frame. A shelf: a file here is a layout on disk.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> list[Video]

Opening must be cheap: frames and masks are read when they are asked for. A field `split`, if there is one, is
set to "test" where the data of a run are judged.
"""

from typing import Protocol

import numpy as np

from dinokit.data.sources import ImageLike


class Video(Protocol):
    """One video, frame by frame."""

    @property
    def name(self) -> str:
        """No other video of the set has it."""
        ...

    def __len__(self) -> int:
        """Frames, 3 or more."""
        ...

    def frame(self, index: int, channels: int) -> ImageLike:
        """The image, decoded.

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
