"""SUN RGB-D (Song et al. 2015): a test of transfer from NYU.

Its 16-bit PNG files are turned by three bits; read as they stand they hold 8000 units a metre.
"""

from dataclasses import dataclass
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._listed import listed


@dataclass
class Config:
    path: str = "???"
    images: str = ""  # sub-folder that the images' paths begin in
    maps: str = ""  # sub-folder that the depth maps' paths begin in
    train: str = "SUNRGBD_train_splits.txt"  # list; a line is IMAGE DEPTH and what follows
    test: str = "SUNRGBD_val_splits.txt"
    depth_scale: float = 8000.0  # stored units in a metre
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Read the lists.

    Raises:
        ValueError: if one is not there or names no pair, or its first pair is not where it should be.
    """
    return listed(cfg)
