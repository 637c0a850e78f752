"""Cityscapes (Cordts et al., arXiv 1604.01685), fine annotations: leftImg8bit/ and gtFine/.

Reads the masks *_gtFine_labelIds.png, as they are delivered: of their 34 ids, 19 are evaluated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseFiles, DenseSource, class_maps, match_files, split_names

IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
IGNORED = tuple(number for number in range(34) if number not in IDS)


@dataclass
class Config:
    path: str = "???"  # the folder with leftImg8bit and gtFine
    split: Literal["all", "train", "test"] = "all"  # test: val; the masks of test are not public
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Search the folders.

    Raises:
        ValueError: if one is missing, or an image or a map has no counterpart.
    """
    root = Path(cfg.path).expanduser()
    images, maps = root / "leftImg8bit", root / "gtFine"
    folders = split_names(cfg.split, "train", "val")
    image_names, map_names = match_files(images, maps, "_leftImg8bit", "_gtFine_labelIds", folders)
    labels = {number: label for label, number in enumerate(IDS)}
    reader = class_maps(list(IDS.values()), (*IGNORED, 255), ids=labels)
    return DenseFiles(images, maps, image_names, map_names, range(len(image_names)), reader, cfg.channels)
