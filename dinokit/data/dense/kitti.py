"""KITTI depth (Geiger et al. 2013) with the Eigen split: 16-bit PNG files, 256 units a metre.

Images of the split without a depth map, which its lists mark with `None`, are not part of it.
"""

from dataclasses import dataclass
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._listed import listed


@dataclass
class Config:
    path: str = "???"
    images: str = "input"  # sub-folder that the images' paths begin in
    maps: str = "gt_depth"  # sub-folder that the depth maps' paths begin in
    train: str = "kitti_eigen_train.txt"  # list; a line is IMAGE DEPTH and what follows
    test: str = "kitti_eigen_test.txt"
    depth_scale: float = 256.0  # stored units in a metre
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Read the lists.

    Raises:
        ValueError: if one is not there or names no pair, or its first pair is not where it should be.
    """
    return listed(cfg)
