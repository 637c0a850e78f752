"""A folder of images and one of maps: a map has the name of its image, whatever the suffix.

Masks are PNG or TIFF files of class ids (a palette's indices are the ids); depth maps hold whole numbers,
`depth_scale` of them a metre, 0 where there is no reading.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import DenseSource
from dinokit.data.dense._files import PairedFiles, pair_up
from dinokit.data.dense._maps import class_maps, depth_maps
from dinokit.data.sources._labels import Categorical
from dinokit.data.sources._split import choose, side


@dataclass
class Config:
    path: str = "???"  # the folder that holds both
    images: str = "images"  # sub-folder, or a path
    maps: str = ""  # likewise; empty: masks or depth, as `target`
    target: Literal["mask", "depth"] = "mask"
    classes: tuple[str, ...] = ()  # names by id
    ignore: tuple[int, ...] = (255,)  # ids that are not judged
    reduce_zero_label: bool = False  # 0 is not judged, and class i is stored as i + 1
    depth_scale: float = 1000.0  # stored units in a metre
    split: Literal["all", "train", "test"] = "all"  # by folders train/ and test/ or val/, else by a hash
    test_share: float = 0.1  # of images held out, where the folders do not say
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Look through both folders.

    Raises:
        ValueError: if one is not there, an image or a map is without the other, or the split has no image.
    """
    root = Path(cfg.path).expanduser()
    images, maps = root / cfg.images, root / (cfg.maps or {"mask": "masks", "depth": "depth"}[cfg.target])
    pictures, targets = pair_up(images, maps)
    tops = Categorical()
    for name in pictures:
        tops.add(name.partition("/")[0] if "/" in name else "")
    said = (tops.codes, tops.words) if {"train", "test"} <= {side(word) for word in tops.words} else None
    rows = choose(cfg.split, cfg.test_share, pictures, len(pictures), said, str(images))
    if cfg.target == "depth":
        return PairedFiles(images, maps, pictures, targets, rows, depth_maps(cfg.depth_scale), cfg.channels)
    reader = class_maps(cfg.classes, cfg.ignore, cfg.reduce_zero_label)
    return PairedFiles(images, maps, pictures, targets, rows, reader, cfg.channels)
