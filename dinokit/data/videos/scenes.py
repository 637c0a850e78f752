"""The built-in scenes in motion: objects of different kinds in the same two colours, in flickering light.

Colours do not follow an object from frame to frame; its material does.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.scenes import Scene, World
from dinokit.data.sources import ImageLike
from dinokit.data.videos import Video


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square frames, 32 or more
    videos: int = 8
    frames: int = 10  # per video
    objects: int = 3  # objects to track per video, the nearest ones that are visible at first; at most 4 are
    seed: int = 0
    split: Literal["train", "test"] = "test"

    def __post_init__(self) -> None:
        check_at_least(self, size=32, videos=1, frames=3, objects=1, seed=0)


class SceneVideo:
    """Video `number`, a function of (seed, split, number) alone; it shares no scene with the image source."""

    def __init__(self, cfg: Config, world: World, number: int) -> None:
        self.cfg, self.name, self._world, self._number = cfg, f"{cfg.split}{number}", world, number

    def __len__(self) -> int:
        return self.cfg.frames

    def frame(self, index: int, channels: int) -> ImageLike:
        """The image, RGB."""
        return Image.fromarray(self._scenes[index].image)

    def mask(self, index: int) -> np.ndarray:
        """(size, size) uint8."""
        first = np.unique(self._scenes[0].instances)
        tracked = first[first > 0][: self.cfg.objects]
        numbers = np.zeros(256, np.uint8)
        numbers[tracked] = np.arange(1, len(tracked) + 1)
        return numbers[self._scenes[index].instances]

    @cached_property
    def _scenes(self) -> list[Scene]:
        return self._world.clip(self._number, self.cfg.frames)


def build(cfg: Config) -> list[Video]:
    """The videos of a split.

    Raises:
        ValueError: if a number is too small.
    """
    world = World(cfg.size, cfg.seed, cfg.split)
    return [SceneVideo(cfg, world, number) for number in range(cfg.videos)]
