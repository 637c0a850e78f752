"""Images with a map of the number of the object at each pixel, in the rows of Parquet files.

0 is no object. With a column of class ids besides, each object has the class of most of its pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import ImageLike, decode, decode_map
from dinokit.data.dense import class_maps
from dinokit.data.files import shards
from dinokit.data.objects import Objects, check_objects, objects_of_ids
from dinokit.data.sources import parquet
from dinokit.data.sources.parquet import read_metadata


@dataclass
class Config:
    path: str = "???"  # a .parquet, a folder of them, or a glob
    image: str = "image"  # column
    instances: str = "instances"  # column of the numbers of objects, as PNG
    mask: str = ""  # column of class ids, as PNG, 255 for none; empty: all objects are of one class
    classes: tuple[str, ...] = ()  # names of the ids of `mask`; empty: those in the file
    split_column: str = "split"  # may be missing
    split: Literal["all", "train", "test"] = "all"  # by that column, else by file names, else by a hash
    test_share: float = 0.1  # of images held out, if the data name no splits
    memory_gib: float = 2.0  # of images, and as much of maps, as stored, that a process may load
    channels: int = 3  # as backbone.channels


class ParquetObjects:
    def __init__(self, cfg: Config) -> None:
        """Read the splits and, if they fit into `memory_gib`, images and maps.

        Raises:
            ValueError: if there is no such file or column, classes have no names, or the split is empty.
        """
        columns, metadata = read_metadata(shards(cfg.path, ".parquet")[0])
        for key, column in (("instances", cfg.instances), ("mask", cfg.mask)):
            if column and column not in columns:
                raise ValueError(
                    f"path='{cfg.path}' has no column '{column}' for {key}.{suggest(column, columns)} It "
                    f"has: {', '.join(columns)}. Set {key}=COLUMN. Of a column of classes alone, "
                    f"name=maps makes objects: their connected parts."
                )
        named = cfg.classes or tuple(metadata.get("classes", ())) if cfg.mask else ("object",)
        if not named:
            raise ValueError(
                f"path='{cfg.path}' does not name the ids of mask={cfg.mask}: set classes=[...]."
            )
        self.classes: Sequence[str] = named
        self._channels = cfg.channels
        self._images, self._instances = (parquet.column(cfg, name) for name in (cfg.image, cfg.instances))
        self._masks = parquet.column(cfg, cfg.mask) if cfg.mask else None
        self._read_classes = class_maps(named) if cfg.mask else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[ImageLike, Objects]:
        name = self.name(index)
        image = decode(self.stored(index), name, self._channels, orient="stored")
        ids = decode_map(self._instances.stored(index), f"The map of objects of {name}")
        labels = None
        if self._masks is not None and self._read_classes is not None:
            where = f"The map of classes of {name}"
            classes = self._read_classes(self._masks.stored(index), where)
            if classes.shape != ids.shape:
                had = " x ".join(str(n) for n in reversed(classes.shape))
                raise ValueError(
                    f"{where} has {had} pixels, that of its objects {ids.shape[1]} x {ids.shape[0]}."
                )
            numbers = [int(number) for number in np.unique(ids) if number > 0]
            labels = {number: _most_frequent(classes[ids == number]) for number in numbers}
        objects = objects_of_ids(ids, labels)
        check_objects(image, objects, name)
        return image, objects

    def stored(self, index: int) -> bytes:
        """The content of the image file."""
        return self._images.stored(index)

    def name(self, index: int) -> str:
        """The file and the row in it, counted from 0."""
        return self._images.name(index)


def _most_frequent(classes: np.ndarray) -> int:
    """The class of most of the pixels (n,) that have one; -1 if none has."""
    known = classes[classes >= 0]
    return int(np.bincount(known).argmax()) if len(known) else -1


build = ParquetObjects
