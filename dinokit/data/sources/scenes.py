"""Built-in rendered images with known labels, so that a first run needs no data set and no download.

A scene shows twelve to sixteen objects of one silhouette, the class, on a cluttered ground. Colour, texture,
size, pose, position and ground have the same distributions for all classes, and vary within an image about as
much as between images: only the silhouette is common to two crops of an image. Class and depth of every pixel
are known, so segmentation and depth can be evaluated as well.

Scene i is a function of (seed, split, i) alone. Between two machines a pixel may differ by one grey level,
where their sines or matrix products round differently.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.data.files import stamp_of
from dinokit.data.scenes import Renderer, Scene
from dinokit.data.scenes.shapes import NAMES


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 10_000  # training scenes
    test_count: int = 2_000  # scenes of the test split, none of which is a training scene
    seed: int = 0
    split: Literal["all", "train", "test"] = "all"  # all: the training scenes, then the test scenes


class Scenes:
    """The scenes of one split. Labels cycle through the classes, so all classes are equally frequent."""

    def __init__(self, cfg: Config) -> None:
        """Set up the renderer.

        Raises:
            ValueError: if a number is too small, or there is no such split.
        """
        _check(cfg)
        self.cfg = cfg
        self.classes = NAMES
        self._renderer = Renderer(cfg.size)

    def __len__(self) -> int:
        cfg = self.cfg
        return {"all": cfg.count + cfg.test_count, "train": cfg.count, "test": cfg.test_count}[cfg.split]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, RGB, and its class.

        Raises:
            IndexError: if there is no such scene.
        """
        scene = self.scene(index)
        return Image.fromarray(scene.image), scene.label

    def scene(self, index: int) -> Scene:
        """The image together with the class and the depth of each pixel.

        Raises:
            IndexError: if there is no such scene.
        """
        split, number = self._locate(index)
        bits = np.random.PCG64([self.cfg.seed, ("train", "test").index(split), number])
        return self._renderer.render(np.random.Generator(bits), number % len(NAMES))

    def name(self, index: int) -> str:
        """As in 'scenes train 17'."""
        split, number = self._locate(index)
        return f"scenes {split} {number}"

    def stamp(self) -> str:
        """A stamp of the settings and of a rendered scene, which changes when the renderer changes."""
        return stamp_of([], self.cfg, self.scene(0).image)

    def _locate(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(
                f"There is no scene {index}: split '{self.cfg.split}' has {len(self)}, counted from 0."
            )
        if self.cfg.split != "all":
            return self.cfg.split, index
        return ("train", index) if index < self.cfg.count else ("test", index - self.cfg.count)


def _check(cfg: Config) -> None:
    for key, least in {"size": 32, "count": 1, "test_count": 1, "seed": 0}.items():
        if getattr(cfg, key) < least:
            why = ": smaller silhouettes cannot be distinguished" if key == "size" else ""
            raise ValueError(f"scenes: {key}={getattr(cfg, key)}, but it must be {least} or more{why}.")
    if cfg.split not in ("all", "train", "test"):
        raise ValueError(f"scenes: there is no split '{cfg.split}'; there is: all, train, test.")


build = Scenes
