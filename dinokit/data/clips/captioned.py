"""The built-in boards in motion: one thing moves to the left, the right, up or down, and that is the class.

A clip that runs backwards shows the opposite class with the same frames, so that nothing but their order says
which it is. The middle of a path says nothing of its direction: see dinokit.data.scenes.captioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dinokit.config.registry import check_at_least
from dinokit.data.clips import Clips, split_of
from dinokit.data.scenes.captioned import DIRECTIONS, CaptionedWorld
from dinokit.data.video import FPS


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square frames, 32 or more
    count: int = 2_000  # training clips
    test_count: int = 400  # test clips, none of which is a training clip
    frames: int = 15  # in a clip; of an odd number, one is in the middle of the path
    things: int = 3  # most things in a clip, 1 to 4; one of them moves
    seed: int = 0
    split: Literal["auto", "train", "test"] = (
        "auto"  # auto: that of the section train or test; elsewhere test
    )

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, test_count=1, frames=1, things=1, seed=0)


@dataclass(frozen=True)
class DrawnClip:
    """Clip `number` of a world."""

    world: CaptionedWorld
    number: int
    count: int  # of its frames

    @property
    def name(self) -> str:
        return f"captioned {self.world.split} {self.number}"

    @property
    def label(self) -> int:
        return self.number % len(DIRECTIONS)

    def __len__(self) -> int:
        return self.count

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(n, S, S, 3) uint8; see Clip."""
        return self.world.clip(self.number, self.count).frames[list(indices)]

    def seconds(self, indices: Sequence[int]) -> list[float]:
        """As at 25 frames a second."""
        return [i / FPS for i in indices]


def build(cfg: Config) -> Clips:
    """The clips of a split; left, right, up and down in turns.

    Raises:
        ValueError: if a number is out of its range.
    """
    split = split_of(cfg.split)
    world = CaptionedWorld(cfg.size, cfg.seed, split, (1, cfg.things))
    count = cfg.count if split == "train" else cfg.test_count
    clips = [DrawnClip(world, number, cfg.frames) for number in range(count)]
    changed: dict[str, tuple[int, ...]] = {
        "backwards": (1, 0, 3, 2),
        "mirrored": (1, 0, 2, 3),
        "flipped": (0, 1, 3, 2),
    }
    return Clips(DIRECTIONS, clips, changed)
