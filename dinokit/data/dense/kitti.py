"""KITTI depth (Geiger et al. 2013) with the Eigen split: 16-bit PNG files, 256 units per metre.

Images without a depth map, which the lists mark with `None`, are left out.
"""

from dataclasses import dataclass
from typing import Literal

from dinokit.data.dense import listed_depth


@dataclass
class Config:
    path: str = "???"
    images: str = "input"  # sub-folder that the paths of images are relative to
    maps: str = "gt_depth"  # sub-folder that the paths of depth maps are relative to
    train: str = "kitti_eigen_train.txt"  # list; a line is IMAGE DEPTH, then anything
    test: str = "kitti_eigen_test.txt"
    depth_scale: float = 256.0  # stored units per metre
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


build = listed_depth
