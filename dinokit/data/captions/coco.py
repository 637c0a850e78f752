"""Images with one JSON file of captions, as COCO has it (captions_train2017.json) and other sets use it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinokit.data.captions import joined
from dinokit.data.decode import ImageLike, decode
from dinokit.data.files import existing
from dinokit.data.objects.coco import annotation_file, listed_images
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
    classes: Sequence[str] = ()

    def __init__(self, cfg: Config) -> None:
        """Read the file of captions.

        Raises:
            ValueError: if it does not exist, is no such file, or names no image with a caption.
        """
        self._root, self._channels = existing(cfg.path), cfg.channels
        file = annotation_file(self._root, cfg.annotations)
        try:
            content = json.loads(read_regular(file))
            names = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
            of_image: dict[Any, list[Any]] = {}
            for entry in content["annotations"]:
                of_image.setdefault(entry["image_id"], []).append(entry["caption"])
        except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
            raise ValueError(
                f"annotations={cfg.annotations} is no file of captions: it needs `images` and `annotations` "
                f"with `caption` (COCO's captions_*.json)."
            ) from None
        keys = listed_images(names, of_image, file, "captions", "no caption")
        files = [names[key] for key in keys]
        rows = choose_split(cfg.split, cfg.test_share, files, len(files), None, str(file))
        self._names = [files[row] for row in rows]
        self._captions = [joined(of_image[keys[row]], f"{file}, {files[row]}") for row in rows]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return decode(read_regular(self.file(index)), self.name(index), self._channels), -1

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """One kind: the captions of the image."""
        return [self._captions[index]]

    def file(self, index: int) -> Path:
        """The file of the image."""
        return self._root / self._names[index]

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.file(index))


build = Coco
