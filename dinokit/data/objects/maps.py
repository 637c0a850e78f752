"""Objects of any dense dataset of classes (dinokit.data.dense): the connected parts of each class.

Two objects of a class that touch are one here. For true instances take another layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from dinokit.config import registry
from dinokit.config.registry import check_at_least
from dinokit.data.decode import ImageLike
from dinokit.data.dense import CheckedMaps, DenseSource
from dinokit.data.objects import Objects, ndimage
from dinokit.data.objects.rle import Rle, encode

AROUND = np.ones((3, 3))  # pixels that touch at a corner are connected too


@dataclass
class Config:
    # the dense dataset: maps.name=LAYOUT and its keys
    maps: dict[str, Any] | None = field(default=None, metadata={"registry": "data.dense"})
    leave_out: tuple[str, ...] = ("background", "ground")  # classes that are no objects, if there are such
    min_area: int = 64  # pixels; smaller parts are left out
    split: Literal["all", "train", "test"] = "all"  # of the dense dataset
    channels: int = 3  # as backbone.channels

    def __post_init__(self) -> None:
        check_at_least(self, min_area=1)


class MapObjects:
    def __init__(self, cfg: Config) -> None:
        """Open the dense dataset.

        Raises:
            ValueError: if none is given, it has no classes, or all are left out.
        """
        if not cfg.maps or not cfg.maps.get("name"):
            have = ", ".join(registry.names("data.dense"))
            raise ValueError(f"maps.name must be given, a layout of images with class maps: {have}.")
        keys = {item.name for item in fields(registry.find("data.dense", cfg.maps["name"]).Config)}
        given = {"target": "mask", "split": cfg.split, "channels": cfg.channels}
        section = {**cfg.maps, **{key: value for key, value in given.items() if key in keys}}
        self._source: DenseSource = registry.build("data.dense", section)
        if "." in section["name"]:
            self._source = CheckedMaps(self._source)
        self.classes: Sequence[str] = self._source.classes
        self._taken = [i for i, name in enumerate(self.classes) if name not in cfg.leave_out]
        self._min_area = cfg.min_area
        if not self._taken:
            raise ValueError(
                f"leave_out={list(cfg.leave_out)} leaves no class of {', '.join(self.classes) or 'none'}."
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[ImageLike, Objects]:
        image, target = self._source[index]
        rles: list[Rle] = []
        labels: list[int] = []
        for label in self._taken:
            parts, count = ndimage().label(target == label, AROUND)
            areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
            for number in (np.flatnonzero(areas >= self._min_area) + 1).tolist():
                rles.append(encode(parts == number))
                labels.append(label)
        return image, Objects((target.shape[0], target.shape[1]), rles, labels)

    def name(self, index: int) -> str:
        """What the dense dataset calls the image."""
        return self._source.name(index)


build = MapObjects
