"""The built-in scenes in motion: objects of one silhouette in different colours move independently."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.scenes import Renderer, Scene
from dinokit.data.scenes.shapes import NAMES
from dinokit.data.sources import ImageLike
from dinokit.data.videos import Video


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square frames, 32 or more
    videos: int = 8
    frames: int = 10  # per video
    objects: int = 3  # objects to track per video, the nearest ones
    seed: int = 0
    split: Literal["train", "test"] = "test"

    def __post_init__(self) -> None:
        check_at_least(self, size=32, videos=1, frames=3, objects=1, seed=0)


class SceneVideo:
    """Video `number`, a function of (seed, split, number) alone; it shares no scene with the image source.

    From the first frame to the last an object moves by up to half of the image's side.
    """

    def __init__(self, cfg: Config, renderer: Renderer, number: int) -> None:
        self.cfg, self.name, self._renderer, self._number = cfg, f"{cfg.split}{number}", renderer, number
        first = self._scene(0)
        distances = np.unique(first.depth[first.mask > 0])  # of the visible objects, nearest first
        self._tracked = distances[: cfg.objects]

    def __len__(self) -> int:
        return self.cfg.frames

    def frame(self, index: int, channels: int) -> ImageLike:
        """The image, RGB."""
        return Image.fromarray(self._scene(index).image)

    def mask(self, index: int) -> np.ndarray:
        """(size, size) uint8."""
        scene = self._scene(index)
        mask = np.zeros(scene.mask.shape, np.uint8)
        for number, distance in enumerate(self._tracked, start=1):
            mask[(scene.depth == distance) & (scene.mask > 0)] = number
        return mask

    def _scene(self, index: int) -> Scene:
        split = 2 + ("train", "test").index(self.cfg.split)  # 0 and 1 are used by the image source
        rng = np.random.Generator(np.random.PCG64([self.cfg.seed, split, self._number]))
        return self._renderer.render(rng, self._number % len(NAMES), index / (self.cfg.frames - 1))


def build(cfg: Config) -> list[Video]:
    """The videos of a split.

    Raises:
        ValueError: if a number is too small.
    """
    renderer = Renderer(cfg.size)
    return [SceneVideo(cfg, renderer, number) for number in range(cfg.videos)]
