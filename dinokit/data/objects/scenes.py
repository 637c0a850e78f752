"""The built-in scenes with a mask for each object, without a download.

An image shows objects of two or three kinds, unless mixed=false: with one kind in an image, whatever finds
the foreground finds every object of a class.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.decode import ImageLike
from dinokit.data.objects import Objects, objects_of_ids
from dinokit.data.scenes import NAMES, Scene, World, locate, split_counts


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 10_000  # training scenes
    test_count: int = 2_000  # scenes of the test split, none of which is a training scene
    seed: int = 0
    mixed: bool = True  # several kinds of objects in an image; false: the scenes of the other sources
    kinds: tuple[str, ...] = ()  # the kinds that may appear, two or more; empty: all. Only with mixed=true
    split: Literal["all", "train", "test"] = "all"  # all: the training scenes, then the test scenes

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, test_count=1, seed=0)
        if self.kinds and not self.mixed:
            raise ValueError("kinds has no effect with mixed=false: remove it, or set mixed=true.")


class SceneObjects:
    """Label i is kind i; the nearest object comes first."""

    def __init__(self, cfg: Config) -> None:
        """Set up the renderer.

        Raises:
            ValueError: if there is no such kind, or only one is given.
        """
        self.cfg, self.classes = cfg, NAMES
        wrong = [name for name in cfg.kinds if name not in NAMES]
        if wrong or len(set(cfg.kinds)) == 1:
            what = f"there is no kind '{wrong[0]}'" if wrong else "two kinds or more are needed"
            raise ValueError(f"kinds={list(cfg.kinds)}: {what}. There is: {', '.join(NAMES)}.")
        self._kinds = [NAMES.index(name) for name in dict.fromkeys(cfg.kinds or NAMES)]
        self._counts = split_counts(cfg.split, cfg.count, cfg.test_count)
        self._worlds = {split: World(cfg.size, cfg.seed, split) for split in self._counts}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __getitem__(self, index: int) -> tuple[ImageLike, Objects]:
        """The image, RGB, and its objects.

        Raises:
            IndexError: if there is no such scene.
        """
        scene = self.scene(index)
        numbers = np.unique(scene.instances[scene.instances > 0]).tolist()
        labels = {n: int(scene.mask[scene.instances == n][0]) - 1 for n in numbers}
        return Image.fromarray(scene.image), objects_of_ids(scene.instances, labels)

    def scene(self, index: int) -> Scene:
        """The image with the class, the object and the depth of each pixel. Raises as []."""
        split, number = locate(index, self._counts)
        world = self._worlds[split]
        return world.mixed(number, self._kinds) if self.cfg.mixed else world.scene(number)

    def name(self, index: int) -> str:
        """As in 'scenes train 17'."""
        split, number = locate(index, self._counts)
        return f"scenes {split} {number}"


build = SceneObjects
