"""Images with one JSON file of instances, as COCO, LVIS and the exports of labelling tools have them.

A mask is a list of polygons or run lengths. Crowds (`iscrowd`), which are no single object, are left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinokit.data.decode import ImageLike, decode
from dinokit.data.files import check_below, existing
from dinokit.data.objects import Objects, check_objects
from dinokit.data.objects.rle import Rle, encode, from_json
from dinokit.data.sources import choose_split
from dinokit.runtime.files import read_regular


@dataclass
class Config:
    path: str = "???"  # the folder of the images
    annotations: str = "???"  # the JSON file: a path, or relative to `path`
    split: Literal["all", "train", "test"] = "all"  # by a hash of the names
    test_share: float = 0.1  # of images held out
    channels: int = 3  # as backbone.channels


class Coco:
    def __init__(self, cfg: Config) -> None:
        """Read the file of instances.

        Raises:
            ValueError: if it does not exist, is no such file, or names no image with an instance.
        """
        self._root, self._channels = existing(cfg.path), cfg.channels
        self._file = annotation_file(self._root, cfg.annotations)
        try:
            content = json.loads(read_regular(self._file))
            categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            images = {entry["id"]: entry for entry in content["images"]}
            names = {key: str(entry["file_name"]) for key, entry in images.items()}
            self._size = {key: (int(x["height"]), int(x["width"])) for key, x in images.items()}
            of_image: dict[Any, list[Mapping[str, Any]]] = {}
            for entry in content["annotations"]:
                if not entry.get("iscrowd"):
                    of_image.setdefault(entry["image_id"], []).append(entry)
            used = {int(entry["category_id"]) for each in of_image.values() for entry in each}
        except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
            raise ValueError(
                f"annotations={cfg.annotations} is no file of instances: it needs `images`, `annotations` "
                f"and `categories` (COCO's instances_*.json)."
            ) from None
        none = "no mask of a single object"
        keys = listed_images(names, of_image, self._file, "masks", none)
        if used - categories.keys():
            raise ValueError(
                f"{self._file} has masks of category_id={min(used - categories.keys())}, which its "
                f"`categories` do not list: add it there."
            )
        self.classes: Sequence[str] = [categories[key] for key in sorted(categories)]
        self._label = {key: label for label, key in enumerate(sorted(categories))}
        self._names, self._instances = names, of_image
        files = [names[key] for key in keys]
        rows = choose_split(cfg.split, cfg.test_share, files, len(files), None, str(self._file))
        self._keys = [keys[row] for row in rows]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[ImageLike, Objects]:
        key, name = self._keys[index], self.name(index)
        # As stored: polygons lie on the pixels of the file, whatever its EXIF orientation.
        image = decode(self.stored(index), name, self._channels, orient="stored")
        size, where = self._size[key], f"{self._file}, {self._names[key]}"
        check_objects(image, Objects(size, [], []), name)  # before masks of that size are made
        instances = self._instances[key]
        rles = [read_segmentation(each.get("segmentation"), size, where) for each in instances]
        objects = Objects(size, rles, [self._label[int(each["category_id"])] for each in instances])
        check_objects(image, objects, where)
        return image, objects

    def file(self, index: int) -> Path:
        """The file of the image."""
        return self._root / self._names[self._keys[index]]

    def stored(self, index: int) -> bytes:
        """Its content."""
        return read_regular(self.file(index))

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.file(index))


def annotation_file(root: Path, annotations: str) -> Path:
    """The JSON file: below the folder of the images, or at a path of its own.

    Raises:
        ValueError: if there is none.
    """
    beside = root / annotations
    return beside if beside.is_file() else existing(annotations)


def listed_images(
    names: Mapping[Any, str], of_image: Mapping[Any, Any], file: Path, what: str, none: str
) -> list[Any]:
    """The ids of the images that have annotations, sorted as text.

    Args:
        names: the file names of all images, by id.
        of_image: the annotations, by id.
        file: that has them, for errors.
        what: the annotations are, for errors.
        none: of them, for errors.

    Raises:
        ValueError: if a name leads out of the folder, an id has no name, or there is no annotation.
    """
    for name in names.values():
        check_below(name, file)
    unknown = of_image.keys() - names.keys()
    if unknown:
        raise ValueError(
            f"{file} has {what} of images that it does not list, such as {min(unknown, key=str)}."
        )
    if not of_image:
        raise ValueError(f"{file} has {none}.")
    return sorted(of_image, key=str)


def read_segmentation(value: Any, size: tuple[int, int], name: str) -> Rle:
    """The mask of an instance: run lengths, or polygons as lists x0, y0, x1, y1, ... of pixels.

    Raises:
        ValueError: with `name`, if it is neither.
    """
    if isinstance(value, Mapping):
        return from_json(value, name)
    mask = np.zeros(size, bool)
    try:
        for polygon in value:
            mask |= inside(np.array(polygon, dtype=np.float64).reshape(-1, 2), size)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: a `segmentation` is neither run lengths nor a list of polygons [x0, y0, x1, y1, ...]."
        ) from None
    return encode(mask)


def inside(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre is inside a polygon, by the even-odd rule: (H, W) bool.

    Pillow draws the outline as well, half a pixel too much on each side, which is a lot for small objects.
    COCO's own code works on a finer grid and differs along the outline by fractions of a pixel.

    Args:
        corners: (n, 2), x and y; coordinates are edges of pixels.
        size: height, width.
    """
    height, width = size
    crossings = np.zeros((height, width + 1), np.int64)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        first, last = (int(np.clip(np.ceil(y - 0.5), 0, height)) for y in sorted((y0, y1)))
        rows = np.arange(first, last)
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0) if len(rows) else np.zeros(0)
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.add.at(crossings, (rows, columns), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1


build = Coco
