"""Built-in rendered images with known labels, so that a first run needs no data set and no download.

A scene shows objects of one kind, the class, on a floor before a wall: see dinokit.data.scenes. Its class
cannot be read from pixels or colours, but two crops of an image share it. Class, object and depth of every
pixel are known, so segmentation and depth can be evaluated as well.

Scene i is a function of (seed, split, i) alone. Between two machines a pixel may differ by one grey level,
where their sines or matrix products round differently.
"""

import mmap
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.data.files import stamp_of
from dinokit.data.scenes import NAMES, Scene, World, locate, split_counts

STORE_BYTES = 2**29  # of address space for one size, seed and split; pages that nothing wrote take no memory


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    count: int = 10_000  # training scenes
    test_count: int = 2_000  # scenes of the test split, none of which is a training scene
    seed: int = 0
    split: Literal["all", "train", "test"] = "all"  # all: the training scenes, then the test scenes


class Scenes:
    """The scenes of one split. Labels cycle through the classes, so all classes are equally frequent.

    An image is rendered on its first access and then kept in memory, for all sources and loader processes.
    """

    def __init__(self, cfg: Config) -> None:
        """Set up the memory, which loader processes that are forked later share.

        Raises:
            ValueError: if a number is too small, or there is no such split.
        """
        _check(cfg)
        self.cfg = cfg
        self.classes = NAMES
        self._counts = split_counts(cfg.split, cfg.count, cfg.test_count)
        for split in self._counts:
            _store(cfg.size, cfg.seed, split)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, RGB, and its class.

        Raises:
            IndexError: if there is no such scene.
        """
        split, number = locate(index, self._counts)
        image = _store(self.cfg.size, self.cfg.seed, split).image(number)
        return Image.fromarray(image), number % len(NAMES)

    def scene(self, index: int) -> Scene:
        """The image together with the class, the object and the depth of each pixel.

        Raises:
            IndexError: if there is no such scene.
        """
        split, number = locate(index, self._counts)
        return _store(self.cfg.size, self.cfg.seed, split).world.scene(number)

    def name(self, index: int) -> str:
        """As in 'scenes train 17'."""
        split, number = locate(index, self._counts)
        return f"scenes {split} {number}"

    def stamp(self) -> str:
        """A stamp of the settings and of a rendered scene, which changes when the renderer changes."""
        return stamp_of([], self.cfg, self.scene(0).image)


class _Store:
    """The first images of a world, in memory that forked processes share.

    Two processes may render the same image at the same time; both write the same bytes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        shape = (world.size, world.size, 3)
        count = STORE_BYTES // (world.size**2 * 3 + 1)
        memory = np.frombuffer(mmap.mmap(-1, STORE_BYTES), np.uint8)
        self._rendered = memory[:count]  # 0 or 1
        self._images = memory[count : count + count * world.size**2 * 3].reshape(count, *shape)

    def image(self, index: int) -> NDArray[np.uint8]:
        """(S, S, 3); a copy, as the memory is shared."""
        if index >= len(self._images):
            return self.world.scene(index).image
        if not self._rendered[index]:
            self._images[index] = self.world.scene(index).image
            self._rendered[index] = 1
        return self._images[index].copy()


@lru_cache(maxsize=8)
def _store(size: int, seed: int, split: str) -> _Store:
    return _Store(World(size, seed, split))


def _check(cfg: Config) -> None:
    for key, least in {"size": 32, "count": 1, "test_count": 1, "seed": 0}.items():
        if getattr(cfg, key) < least:
            why = ": the materials of smaller objects cannot be distinguished" if key == "size" else ""
            raise ValueError(f"scenes: {key}={getattr(cfg, key)}, but it must be {least} or more{why}.")
    if cfg.split not in ("all", "train", "test"):
        raise ValueError(f"scenes: there is no split '{cfg.split}'; there is: all, train, test.")


build = Scenes
