"""SUN RGB-D (Song et al. 2015): a test of transfer from NYU.

Its 16-bit PNG files are rotated by three bits; read as they are, they have 8000 units per metre.
"""

from dataclasses import dataclass
from typing import Literal

from dinokit.data.dense import listed_depth


@dataclass
class Config:
    path: str = "???"
    images: str = ""  # sub-folder that the paths of images are relative to
    maps: str = ""  # sub-folder that the paths of depth maps are relative to
    train: str = "SUNRGBD_train_splits.txt"  # list; a line is IMAGE DEPTH, then anything
    test: str = "SUNRGBD_val_splits.txt"
    depth_scale: float = 8000.0  # stored units per metre
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


build = listed_depth
