"""NYU Depth V2 (Silberman et al. 2012) with the lists that monocular depth estimation uses: millimetres."""

from dataclasses import dataclass
from typing import Literal

from dinokit.data.dense import listed_depth


@dataclass
class Config:
    path: str = "???"
    images: str = ""  # sub-folder that the paths of images are relative to
    maps: str = ""  # sub-folder that the paths of depth maps are relative to
    train: str = "nyu_train.txt"  # list; a line is IMAGE DEPTH, then anything
    test: str = "nyu_test.txt"
    depth_scale: float = 1000.0  # stored units per metre
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


build = listed_depth
