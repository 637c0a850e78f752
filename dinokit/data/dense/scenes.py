"""The built-in scenes with the class or the depth of each pixel, without a download."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.data.decode import ImageLike
from dinokit.data.scenes import NAMES
from dinokit.data.sources import scenes


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 10_000  # training scenes
    test_count: int = 2_000  # scenes of the test split, none of which is a training scene
    seed: int = 0
    target: Literal["mask", "depth"] = "mask"
    split: Literal["all", "train", "test"] = "all"  # all: the training scenes, then the test scenes


class SceneMaps:
    """Class 0 is the ground, floor and wall; class i + 1 has the objects of kind i."""

    def __init__(self, cfg: Config) -> None:
        """Set up the renderer.

        Raises:
            ValueError: if a number is too small, or there is no such split.
        """
        self._target = cfg.target
        self._scenes = scenes.build(
            scenes.Config(cfg.size, cfg.count, cfg.test_count, cfg.seed, split=cfg.split)
        )
        self.classes = ("ground", *NAMES) if cfg.target == "mask" else ()

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        scene = self._scenes.scene(index)
        target = scene.mask.astype(np.int16) if self._target == "mask" else scene.depth
        return Image.fromarray(scene.image), target

    def name(self, index: int) -> str:
        """As in 'scenes train 17'."""
        return self._scenes.name(index)


build = SceneMaps
