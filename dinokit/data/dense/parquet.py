"""Images with masks or depth maps in the rows of Parquet files, one column each.

The class names of masks are `classes`, or else they are read from JSON under the key `dinokit` of the
schema's metadata: `classes`, which name the ids of masks unless the file has labels, and `coarse_classes`
with `fine_to_coarse`, a smaller set of classes for the same masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import ImageLike, decode
from dinokit.data.dense import ClassMaps, DepthMaps, check_size, class_maps
from dinokit.data.files import shards
from dinokit.data.sources import parquet
from dinokit.data.sources.parquet import read_metadata


@dataclass
class Config:
    path: str = "???"  # a .parquet, a folder of them, or a glob
    image: str = "image"  # column
    mask: str = "mask"  # column of class ids, as PNG
    depth: str = "depth"  # column of depth maps, as 16-bit PNG
    target: Literal["mask", "depth"] = "mask"  # which of them to read
    classes: tuple[str, ...] = ()  # names by id; empty: those in the file
    coarse: bool = False  # the file's own smaller set of classes
    ignore: tuple[int, ...] = (255,)  # ids of pixels that are not evaluated
    reduce_zero_label: bool = False  # 0 is ignored, and class i is stored as i + 1
    depth_scale: float = 1000.0  # stored units per metre
    split_column: str = "split"  # may be missing
    split: Literal["all", "train", "test"] = "all"  # by that column, else by file names, else by a hash
    test_share: float = 0.1  # of images held out, if the data name no splits
    memory_gib: float = 2.0  # of images, and as much of maps, as stored, that a process may load
    channels: int = 3  # as backbone.channels


class ParquetDense:
    def __init__(self, cfg: Config) -> None:
        """Read the splits and, if they fit into `memory_gib`, images and maps.

        Raises:
            ValueError: if there is no such file or column, the classes are not known, or the split is empty.
        """
        column = cfg.mask if cfg.target == "mask" else cfg.depth
        columns, metadata = read_metadata(shards(cfg.path, ".parquet")[0])
        if column not in columns:
            raise ValueError(
                f"path='{cfg.path}' has no column '{column}' for {cfg.target}.{suggest(column, columns)} It "
                f"has: {', '.join(columns)}. Set {cfg.target}=COLUMN."
            )
        self._read_map: ClassMaps | DepthMaps
        self._read_map = (
            _reader(cfg, columns, metadata) if cfg.target == "mask" else DepthMaps(cfg.depth_scale)
        )
        self.classes: Sequence[str] = self._read_map.classes
        self._channels = cfg.channels
        self._images, self._maps = (parquet.column(cfg, name) for name in (cfg.image, column))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        name = self.name(index)
        image = decode(self._images.stored(index), name, self._channels, orient="stored")
        target = self._read_map(self._maps.stored(index), f"The map of {name}")
        check_size(image, target, name)
        return image, target

    def stored(self, index: int) -> bytes:
        """The content of the image file in the image column."""
        return self._images.stored(index)

    def name(self, index: int) -> str:
        """The file and the row in it, counted from 0."""
        return self._images.name(index)


build = ParquetDense


def _reader(cfg: Config, columns: Sequence[str], metadata: Mapping[str, Any]) -> ClassMaps:
    if cfg.coarse:
        if cfg.classes:
            raise ValueError("Set either classes or coarse=true: both name the classes.")
        absent = [key for key in ("coarse_classes", "fine_to_coarse") if key not in metadata]
        if absent:
            raise ValueError(
                f"coarse=true, but the metadata of path='{cfg.path}' has no {' and no '.join(absent)}; "
                f"it has: {', '.join(metadata) or 'nothing'}."
            )
        return class_maps(
            metadata["coarse_classes"], cfg.ignore, ids=dict(enumerate(metadata["fine_to_coarse"]))
        )
    named = metadata.get("classes", ()) if "label" not in columns else ()
    classes = cfg.classes or tuple(named)
    if not classes:
        raise ValueError(
            f"path='{cfg.path}' does not name the classes of its masks: list all names in the order of their "
            f"ids, such as classes=[background,cat]; reduce_zero_label=true if ids begin at 1."
        )
    return class_maps(classes, cfg.ignore, cfg.reduce_zero_label)
