"""A folder of images and one of maps: a map has the name of its image, with any suffix.

Masks are PNG or TIFF files of class ids (a palette's indices are the ids); depth maps store integers,
`depth_scale` units per metre, 0 where there is no depth.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.dense import ClassMaps, DenseFiles, DenseSource, DepthMaps, class_maps, match_files
from dinokit.data.sources import choose_split, splits_of_folders


@dataclass
class Config:
    path: str = "???"  # the folder with both
    images: str = "images"  # sub-folder, or a path
    maps: str = ""  # likewise; empty: masks or depth, as `target`
    target: Literal["mask", "depth"] = "mask"
    classes: tuple[str, ...] = ()  # names by id
    ignore: tuple[int, ...] = (255,)  # ids of pixels that are not evaluated
    reduce_zero_label: bool = False  # 0 is ignored, and class i is stored as i + 1
    depth_scale: float = 1000.0  # stored units per metre
    split: Literal["all", "train", "test"] = "all"  # by folders train/ and test/ or val/, else by a hash
    test_share: float = 0.1  # of images held out, if the folders name no splits
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> DenseSource:
    """Search both folders.

    Raises:
        ValueError: if one is missing, an image or a map has no counterpart, or the split has no image.
    """
    root = Path(cfg.path).expanduser()
    images, maps = root / cfg.images, root / (cfg.maps or {"mask": "masks", "depth": "depth"}[cfg.target])
    image_names, map_names = match_files(images, maps)
    _, named = splits_of_folders(image_names)
    rows = choose_split(cfg.split, cfg.test_share, image_names, len(image_names), named, str(images))
    reader: ClassMaps | DepthMaps
    if cfg.target == "depth":
        reader = DepthMaps(cfg.depth_scale)
    else:
        reader = class_maps(cfg.classes, cfg.ignore, cfg.reduce_zero_label)
    return DenseFiles(images, maps, image_names, map_names, rows, reader, cfg.channels)
