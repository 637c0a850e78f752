"""ADE20K as the scene parsing benchmark has it (Zhou et al., arXiv 1608.05442): ADEChallengeData2016.

images/ and annotations/, each with training/ and validation/. 150 classes, stored as 1 to 150; 0 is not
judged. Their names are read from objectInfo150.txt if it is there, and are numbers otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._files import PairedFiles, pair_up, parts, read_lines
from dinokit.data.dense._maps import class_maps

CLASSES = 150


@dataclass
class Config:
    path: str = "???"  # the folder ADEChallengeData2016
    split: Literal["all", "train", "test"] = "all"  # test: validation
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Look through the folders.

    Raises:
        ValueError: if one is not there, or an image or a map is without the other.
    """
    root = Path(cfg.path).expanduser()
    images, maps = root / "images", root / "annotations"
    pictures, targets = pair_up(images, maps, below=parts(cfg.split, "training", "validation"))
    reader = class_maps(_names(root / "objectInfo150.txt"), ignore=(255,), reduce_zero_label=True)
    return PairedFiles(images, maps, pictures, targets, range(len(pictures)), reader, cfg.channels)


def _names(path: Path) -> list[str]:
    if not path.exists():
        return [str(number + 1) for number in range(CLASSES)]
    rows = [line.split("\t") for line in read_lines(path)[1:] if line.strip()]
    names = [row[-1].split(",")[0].strip() for row in rows]
    if len(names) != CLASSES:
        raise ValueError(f"{path} names {len(names)} classes; ADE20K has {CLASSES}. Move it away.")
    return names
