"""Cityscapes (Cordts et al., arXiv 1604.01685), fine annotations: leftImg8bit/ and gtFine/.

The masks read are *_gtFine_labelIds.png, as they are delivered: of their 34 ids, 19 are judged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._files import PairedFiles, pair_up, parts
from dinokit.data.dense._maps import class_maps

IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
OTHERS = tuple(number for number in range(34) if number not in IDS)


@dataclass
class Config:
    path: str = "???"  # the folder that holds leftImg8bit and gtFine
    split: Literal["all", "train", "test"] = "all"  # test: val; nobody has the masks of test
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Look through the folders.

    Raises:
        ValueError: if one is not there, or an image or a map is without the other.
    """
    root = Path(cfg.path).expanduser()
    images, maps = root / "leftImg8bit", root / "gtFine"
    below = parts(cfg.split, "train", "val")
    pictures, targets = pair_up(images, maps, "_leftImg8bit", "_gtFine_labelIds", below)
    labels = {number: place for place, number in enumerate(IDS)}
    reader = class_maps(list(IDS.values()), (*OTHERS, 255), ids=labels)
    return PairedFiles(images, maps, pictures, targets, range(len(pictures)), reader, cfg.channels)
