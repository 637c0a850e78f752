"""Built-in images of a few coloured things on grey ground, of which every attribute is known.

They are those that the language recipes caption and ask about: see dinokit.data.scenes.captioned. With one
thing in an image, its colour, outline or cell is the class, so evaluators measure what features say of each.
Image i is a function of (seed, split, i) alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.files import stamp_of
from dinokit.data.scenes import split_counts
from dinokit.data.scenes.captioned import CELLS, COLOURS, SHAPES, Board, Boards, Thing
from dinokit.data.scenes.sentences import place


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 10_000  # training images
    test_count: int = 2_000  # images of the test split, none of which is a training image
    seed: int = 0
    split: Literal["all", "train", "test"] = "all"  # all: the training images, then the test images
    things: int = 1  # most things in an image, 1 to 4; all numbers up to it are equally frequent
    # what the class of an image is; none with more than one thing
    labels: Literal["pair", "colour", "shape", "cell", "none"] = "pair"

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, test_count=1, seed=0, things=1)
        if self.things > 1 and self.labels != "none":
            raise ValueError(
                f"things={self.things}, and labels={self.labels} is the {self.labels} of one thing: give "
                f"labels=none, or things=1."
            )


# Pairs of a colour and an outline; the others are never in these splits.
PAIRS = [
    (colour, shape)
    for colour in range(len(COLOURS))
    for shape in range(len(SHAPES))
    if not Thing(colour, shape, False, 0).novel
]
CLASSES = {
    "pair": tuple(f"{COLOURS[colour]} {SHAPES[shape]}" for colour, shape in PAIRS),
    "colour": COLOURS,
    "shape": SHAPES,
    "cell": tuple(place(Thing(0, 0, False, cell)) for cell in range(CELLS)),
    "none": (),
}


class Captioned:
    """The images of one split, drawn on access, which takes less time than to decode a file."""

    def __init__(self, cfg: Config) -> None:
        """Prepare to draw.

        Raises:
            ValueError: if there are to be more things than a board may have.
        """
        self.cfg = cfg
        self.classes = CLASSES[cfg.labels]
        counts = split_counts(cfg.split, cfg.count, cfg.test_count)
        self._boards = Boards(cfg.size, cfg.seed, counts, (1, cfg.things))

    def __len__(self) -> int:
        return len(self._boards)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, RGB, and its class, -1 without labels.

        Raises:
            IndexError: if there is no such image.
        """
        board, picture = self._boards[index]
        return Image.fromarray(picture.image), self._label(board)

    def board(self, index: int) -> Board:
        """What is in an image.

        Raises:
            IndexError: if there is no such image.
        """
        return self._boards.board(index)

    def name(self, index: int) -> str:
        """As in 'captioned train 17'."""
        return self._boards.name(index)

    def stamp(self) -> str:
        """A stamp of the settings and of a drawn image, which changes when the renderer changes."""
        return stamp_of([], self.cfg, np.asarray(self[0][0]))

    def _label(self, board: Board) -> int:
        thing = board.things[0]
        match self.cfg.labels:
            case "none":
                return -1
            case "pair":
                return PAIRS.index((thing.colour, thing.shape))
            case "colour":
                return thing.colour
            case "shape":
                return thing.shape
        return thing.cell


build = Captioned
