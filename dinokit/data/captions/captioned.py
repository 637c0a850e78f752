"""The built-in captioned world with its captions, without a download.

Captions are of three kinds: the whole board with all places; one thing, by its colour and outline, or one of
them; and two things with the side on which the first lies. All that are true of an image are listed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.decode import ImageLike
from dinokit.data.scenes import split_counts
from dinokit.data.scenes.captioned import COLOURS, SHAPES, Board, Boards
from dinokit.data.scenes.sentences import describe, exchanged, name


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 20_000  # training images
    test_count: int = 1_000  # images of the test split, and of novel
    seed: int = 0
    things: tuple[int, int] = (1, 4)  # fewest and most in an image
    # all: train, then test; novel: with pairs of colour and outline that train and test never have
    split: Literal["all", "train", "test", "novel"] = "all"

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, test_count=1, seed=0)


class Captioned:
    classes: Sequence[str] = ()

    def __init__(self, cfg: Config) -> None:
        """Set up the worlds.

        Raises:
            ValueError: if `things` are not fewest and most, from 1 to 4.
        """
        self.cfg = cfg
        counts = split_counts(cfg.split, cfg.count, cfg.test_count, novel=cfg.test_count)
        self._boards = Boards(cfg.size, cfg.seed, counts, cfg.things)

    def __len__(self) -> int:
        return len(self._boards)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The image, RGB.

        Raises:
            IndexError: if there is no such image.
        """
        return Image.fromarray(self._boards[index][1].image), -1

    def board(self, index: int) -> Board:
        """What is in the image. Raises as []."""
        return self._boards.board(index)

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """Those of the whole, of one thing and, where there are more, of two."""
        board = self.board(index)
        single = [text for thing in board.things for text in parts(thing.colour, thing.shape)]
        double = relations(board)
        return [[describe(board)], [*dict.fromkeys(single)], *([double] if double else [])]

    def exchanged(self, index: int) -> tuple[str, str] | None:
        """The description of the image, and of it with the colours of two things exchanged."""
        board = self.board(index)
        other = exchanged(board, np.random.default_rng([self.cfg.seed, index]))
        return None if other is None else (describe(board), describe(other))

    def name(self, index: int) -> str:
        """As in 'captioned test 17'."""
        return self._boards.name(index)


def parts(colour: int, shape: int) -> list[str]:
    """What one may call a thing: 'a red disc', 'a red thing', 'a disc'."""
    return [f"a {COLOURS[colour]} {SHAPES[shape]}", f"a {COLOURS[colour]} thing", f"a {SHAPES[shape]}"]


def relations(board: Board) -> list[str]:
    """Two things and the side on which the first lies, of all pairs in different columns or rows."""
    found = []
    for first in board.things:
        for second in board.things:
            across, down = second.column - first.column, second.row - first.row
            sides = {"left of": across > 0, "right of": across < 0, "above": down > 0, "below": down < 0}
            found += [f"{name(first)} {side} {name(second)}" for side, holds in sides.items() if holds]
    return found


build = Captioned
