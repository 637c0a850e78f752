"""Pascal VOC 2012 segmentation: VOCdevkit/VOC2012, with or without the extra masks of SBD.

JPEGImages/, the folder of masks, and ImageSets/Segmentation/ with one list of names a split. 21 classes with
the background; 255, the rim of an object, is not judged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._files import PairedFiles, parts, read_lines
from dinokit.data.dense._maps import class_maps
from dinokit.data.names import Names

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


@dataclass
class Config:
    path: str = "???"  # the folder VOC2012
    maps: str = "SegmentationClass"  # sub-folder; SegmentationClassAug for that of SBD
    train: str = "train"  # name of a list; trainaug for that of SBD
    test: str = "val"
    split: Literal["all", "train", "test"] = "all"
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Read the list.

    Raises:
        ValueError: if a list is not there or is empty.
    """
    root = Path(cfg.path).expanduser()
    lists = root / "ImageSets" / "Segmentation"
    words = [line.split() for part in parts(cfg.split, cfg.train, cfg.test) for line in _list(lists, part)]
    stems = [line[0] for line in words if line]
    if not stems:
        raise ValueError(f"The lists in {lists} for split={cfg.split} name no image.")
    pictures, targets = (Names.of(f"{stem}{end}" for stem in stems) for end in (".jpg", ".png"))
    images, maps = root / "JPEGImages", root / cfg.maps
    return PairedFiles(images, maps, pictures, targets, range(len(stems)), class_maps(CLASSES), cfg.channels)


def _list(folder: Path, name: str) -> list[str]:
    return read_lines(folder / f"{name}.txt")
