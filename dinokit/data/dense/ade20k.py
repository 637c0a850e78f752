"""ADE20K as the scene parsing benchmark has it (Zhou et al., arXiv 1608.05442): ADEChallengeData2016.

images/ and annotations/, each with training/ and validation/. 150 classes, stored as 1 to 150; 0 is
ignored. Their names are read from objectInfo150.txt if it exists, and are numbers otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseFiles, DenseSource, class_maps, match_files, read_lines, split_names

CLASSES = 150


@dataclass
class Config:
    path: str = "???"  # the folder ADEChallengeData2016
    split: Literal["all", "train", "test"] = "all"  # test: validation
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Search the folders.

    Raises:
        ValueError: if one is missing, or an image or a map has no counterpart.
    """
    root = Path(cfg.path).expanduser()
    images, maps = root / "images", root / "annotations"
    image_names, map_names = match_files(
        images, maps, folders=split_names(cfg.split, "training", "validation")
    )
    reader = class_maps(_names(root / "objectInfo150.txt"), ignore=(255,), reduce_zero_label=True)
    return DenseFiles(images, maps, image_names, map_names, range(len(image_names)), reader, cfg.channels)


def _names(path: Path) -> list[str]:
    if not path.exists():
        return [str(number + 1) for number in range(CLASSES)]
    rows = [line.split("\t") for line in read_lines(path)[1:] if line.strip()]
    names = [row[-1].split(",")[0].strip() for row in rows]
    if len(names) != CLASSES:
        raise ValueError(f"{path} names {len(names)} classes; ADE20K has {CLASSES}. Remove this file.")
    return names
