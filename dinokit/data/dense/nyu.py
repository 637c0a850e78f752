"""NYU Depth V2 (Silberman et al. 2012) with the lists that monocular depth estimation uses: millimetres."""

from dataclasses import dataclass
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._listed import listed


@dataclass
class Config:
    path: str = "???"
    images: str = ""  # sub-folder that the images' paths begin in
    maps: str = ""  # sub-folder that the depth maps' paths begin in
    train: str = "nyu_train.txt"  # list; a line is IMAGE DEPTH and what follows
    test: str = "nyu_test.txt"
    depth_scale: float = 1000.0  # stored units in a metre
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Read the lists.

    Raises:
        ValueError: if one is not there or names no pair, or its first pair is not where it should be.
    """
    return listed(cfg)
