"""The built-in captioned world with the colour, the outline or both of the thing at each pixel.

The ground has no word: its pixels are not evaluated.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.decode import ImageLike
from dinokit.data.dense import IGNORE
from dinokit.data.scenes import split_counts
from dinokit.data.scenes.captioned import COLOURS, SHAPES, Boards


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 10_000  # training images
    test_count: int = 1_000  # images of the test split
    seed: int = 0
    labels: Literal["colour", "shape", "pair"] = "colour"
    things: tuple[int, int] = (1, 4)  # fewest and most in an image
    split: Literal["all", "train", "test"] = "all"  # all: the training images, then the test images

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, test_count=1, seed=0)


class CaptionedMaps:
    def __init__(self, cfg: Config) -> None:
        """Set up the worlds.

        Raises:
            ValueError: if `things` are not fewest and most, from 1 to 4.
        """
        counts = split_counts(cfg.split, cfg.count, cfg.test_count)
        self._boards = Boards(cfg.size, cfg.seed, counts, cfg.things)
        self.labels = cfg.labels
        pairs = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
        self.classes = {"colour": COLOURS, "shape": SHAPES, "pair": pairs}[cfg.labels]

    def __len__(self) -> int:
        return len(self._boards)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        """The image, RGB, and its map.

        Raises:
            IndexError: if there is no such image.
        """
        board, picture = self._boards[index]
        of = {"colour": lambda t: t.colour, "shape": lambda t: t.shape}
        label = of.get(self.labels, lambda t: t.colour * len(SHAPES) + t.shape)
        table = np.array([IGNORE, *(label(thing) for thing in board.things)], np.int16)
        return Image.fromarray(picture.image), table[picture.instances]

    def name(self, index: int) -> str:
        """As in 'captioned test 17'."""
        return self._boards.name(index)


build = CaptionedMaps
