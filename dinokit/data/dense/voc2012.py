"""Pascal VOC 2012 segmentation: VOCdevkit/VOC2012, with or without the extra masks of SBD.

JPEGImages/, the folder of masks, and ImageSets/Segmentation/ with one list of names per split. 21 classes
with the background; 255, the outline of an object, is ignored.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseFiles, DenseSource, class_maps, read_lines, split_names
from dinokit.data.files import Names

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


@dataclass
class Config:
    path: str = "???"  # the folder VOC2012
    maps: str = "SegmentationClass"  # sub-folder; SegmentationClassAug for those of SBD
    train: str = "train"  # name of a list; trainaug for that of SBD
    test: str = "val"
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Read the lists.

    Raises:
        ValueError: if a list is missing or empty.
    """
    root = Path(cfg.path).expanduser()
    lists = root / "ImageSets" / "Segmentation"
    files = [lists / f"{name}.txt" for name in split_names(cfg.split, cfg.train, cfg.test)]
    words = [line.split() for file in files for line in read_lines(file)]
    stems = [line[0] for line in words if line]
    if not stems:
        raise ValueError(f"The lists in {lists} for split={cfg.split} name no image.")
    image_names, map_names = (Names.of(f"{stem}{end}" for stem in stems) for end in (".jpg", ".png"))
    images, maps = root / "JPEGImages", root / cfg.maps
    return DenseFiles(
        images, maps, image_names, map_names, range(len(stems)), class_maps(CLASSES), cfg.channels
    )
