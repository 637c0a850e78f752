"""The built-in boards in motion with a caption each, without a download: videos for retrieval by texts.

One thing moves to the left, the right, up or down; the caption says so, and where the others stand. The
images are the frames in the middle, which do not tell the direction; see dinokit.data.scenes.captioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.clips import Clip
from dinokit.data.clips import captioned as clips
from dinokit.data.clips.captioned import DrawnClip
from dinokit.data.decode import ImageLike
from dinokit.data.scenes import split_counts
from dinokit.data.scenes.captioned import DIRECTIONS, Board
from dinokit.data.scenes.sentences import describe, name


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square frames, 32 or more
    count: int = 5_000  # training videos
    test_count: int = 400  # test videos, none of which is a training video
    frames: int = 15  # in a video; of an odd number, one is in the middle of the path
    things: int = 3  # most things in a video, 1 to 4; one of them moves
    seed: int = 0
    split: Literal["all", "train", "test"] = "all"  # all: train, then test

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, test_count=1, frames=1, things=1, seed=0)


class Moving:
    classes: Sequence[str] = ()

    def __init__(self, cfg: Config) -> None:
        """Set up the worlds.

        Raises:
            ValueError: if a number is out of its range.
        """
        self._clips: list[Clip] = []
        for split in split_counts(cfg.split, cfg.count, cfg.test_count):
            part: Literal["train", "test"] = "train" if split == "train" else "test"
            settings = cfg.size, cfg.count, cfg.test_count, cfg.frames, cfg.things, cfg.seed
            self._clips += clips.build(clips.Config(*settings, split=part)).clips

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The frame in the middle, RGB."""
        clip = self._clips[index]
        return Image.fromarray(clip.frames([len(clip) // 2])[0]), -1

    def clip(self, index: int) -> Clip:
        """All frames."""
        return self._clips[index]

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """That of the whole, and that of the thing that moves."""
        board, label = self._known(index)
        return [[sentence_of(board, label)], [f"{name(board.things[-1])} moves {DIRECTIONS[label]}"]]

    def exchanged(self, index: int) -> tuple[str, str]:
        """The caption, and it with the opposite direction: what the video shows backwards."""
        board, label = self._known(index)
        return sentence_of(board, label), sentence_of(board, label ^ 1)

    def name(self, index: int) -> str:
        """As in 'captioned test 17'."""
        return self._clips[index].name

    def _known(self, index: int) -> tuple[Board, int]:
        clip = self._clips[index]
        assert isinstance(clip, DrawnClip)
        return clip.world.clip(clip.number, 1).board, clip.label


def sentence_of(board: Board, label: int) -> str:
    """What moves and what stands: 'a red disc moves left and a blue cross at the top centre'."""
    *still, moving = board.things
    first = f"{name(moving)} moves {DIRECTIONS[label]}"
    return f"{first} and {describe(Board(tuple(still), board.key))}" if still else first


build = Moving
