"""A folder of images with a JSON file of masks beside each, as SA-1B (arXiv 2304.02643) is released.

`NAME.json` has `image` (width, height, file_name) and `annotations`, each with a `segmentation` in run
lengths; other keys are not read. `dinokit segment FOLDER everything=true` writes this layout. Masks have no
classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.data.decode import SUFFIXES, ImageLike, decode, suffix
from dinokit.data.files import Names, existing
from dinokit.data.objects import Objects, check_objects
from dinokit.data.objects.rle import from_json
from dinokit.data.sources import choose_split
from dinokit.runtime.files import read_regular


@dataclass
class Config:
    path: str = "???"  # the folder; it is searched with its sub-folders
    split: Literal["all", "train", "test"] = "all"  # by a hash of the names
    test_share: float = 0.1  # of images held out
    channels: int = 3  # as backbone.channels


class Sa1b:
    classes = ("object",)

    def __init__(self, cfg: Config) -> None:
        """List the images.

        Raises:
            ValueError: if there is no such folder, or it has no image with a JSON file beside it.
        """
        self._root, self._channels = existing(cfg.path), cfg.channels
        found = (p for p in sorted(self._root.rglob("*")) if suffix(p.name) in SUFFIXES)
        names = [
            path.relative_to(self._root).as_posix() for path in found if path.with_suffix(".json").is_file()
        ]
        if not names:
            raise ValueError(
                f"path={cfg.path} has no image with a file of masks beside it, as photo.jpg and photo.json "
                f"are. dinokit segment {cfg.path} everything=true out=FOLDER writes such files."
            )
        self._names = Names.of(names)
        self._rows = choose_split(cfg.split, cfg.test_share, self._names, len(names), None, cfg.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, Objects]:
        path = self.file(index)
        image = decode(self.stored(index), str(path), self._channels, orient="stored")
        beside = path.with_suffix(".json")
        try:
            content = json.loads(read_regular(beside))
            size = (int(content["image"]["height"]), int(content["image"]["width"]))
            masks = [entry["segmentation"] for entry in content["annotations"]]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(
                f"{beside} is no file of masks: it needs `image` with height and width, and `annotations` "
                f"with a `segmentation` each."
            ) from None
        objects = Objects(size, [from_json(mask, str(beside)) for mask in masks], [0] * len(masks))
        check_objects(image, objects, str(path))
        return image, objects

    def file(self, index: int) -> Path:
        """The file of the image."""
        return self._root / self._names[self._rows[index]]

    def stored(self, index: int) -> bytes:
        """Its content."""
        return read_regular(self.file(index))

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.file(index))


build = Sa1b
