"""Images that Python code has in memory or reads itself: a list, an array, a tensor, a Dataset of torch.

It is for dinokit's functions in Python, which take such images in place of a path: a recipe in a file cannot
name them. A run that was trained on them records `data.name=memory`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.config.values import with_source
from dinokit.data.decode import SUFFIXES, ImageLike, as_image, suffix
from dinokit.data.sources import ImageSource

IMAGE_KEYS, LABEL_KEYS = ("image", "img", "pixel_values"), ("label", "labels", "target")
LABELS = ("targets", "labels", "_labels")  # where data sets of torchvision hold them
KINDS = (
    "the path of a file or folder, a section {'name': 'tar', 'path': ...}, a Pillow image, an array, a "
    "tensor, a list of these, or a data set with a length and items (image, label)"
)


@dataclass
class Config:
    images: Any = None  # given in Python; a file cannot hold them
    about: str = ""  # what they were, for people
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> ImageSource:
    """The source of images that were given in Python.

    Raises:
        ValueError: if they are not here: a recipe in a file cannot hold them.
    """
    if cfg.images is None:
        raise ValueError(
            f"data.name=memory{f' ({cfg.about})' if cfg.about else ''} stands for images that Python code "
            f"gave to dinokit, and no file holds them. Give them again in Python, or name others: data.name "
            f"and data.path for a run, train.path and test.path for an evaluation."
        )
    return as_source(cfg.images, cfg.channels)


def as_source(images: Any, channels: int = 3) -> ImageSource:
    """The source that `images` is, or one made of it.

    Args:
        images: a source; a path as of data.path; a section of a recipe; a data set of Hugging Face; one image
            or a sequence of images as as_image() takes them; or a data set of torch whose items are images,
            (image, label, ...) or {"image": ..., "label": ...}.
        channels: as backbone.channels.

    Raises:
        ValueError, LookupError: if it is something else, or cannot be opened.
    """
    if isinstance(images, Mapping) and "name" in images:
        return _from_section(dict(images), channels)
    if isinstance(images, str | Path) and suffix(str(images)) not in SUFFIXES:
        return _from_section(with_source({"path": str(images)}), channels)
    if callable(getattr(images, "name", None)) and hasattr(images, "classes"):
        source: ImageSource = images
        return source
    if type(images).__module__.partition(".")[0] == "datasets":
        from dinokit.data.sources.hf import Config as OfHuggingFace  # noqa: PLC0415 - an optional package
        from dinokit.data.sources.hf import HuggingFace  # noqa: PLC0415

        return HuggingFace(OfHuggingFace(path="given in Python", channels=channels), images)
    if _is_one_image(images):
        images = [images]
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")) or isinstance(images, Mapping):
        raise ValueError(f"Images are {KINDS}; this is a {type(images).__name__}.")
    made = Memory(images, channels)  # its classes are found when they are first asked for
    made.check_first_label()
    found: Any = made
    return found


def _from_section(section: dict[str, Any], channels: int) -> ImageSource:
    name = str(section.pop("name"))
    if any(field == "channels" for field in registry.read_config("data.sources", name).__dataclass_fields__):
        section.setdefault("channels", channels)
    values = section_values("data.sources", name, section, "data")
    source: ImageSource = registry.build("data.sources", {"name": name, **values})
    return source


def _is_one_image(images: Any) -> bool:
    dimensions = getattr(images, "ndim", 0)
    return isinstance(images, str | Path | bytes | Image.Image) or dimensions in (2, 3)


class Memory:
    """A sequence of images, with or without labels, as a source.

    Args:
        items: images, or (image, label, ...), or {"image": ..., "label": ...}.
        channels: as backbone.channels.
        classes: names by label; None: those of `items`, or the numbers of its labels.
        title: begins the names of images.
    """

    def __init__(
        self, items: Any, channels: int, classes: Sequence[str] | None = None, title: str = ""
    ) -> None:
        self.items, self.channels, self.title = items, channels, title or type(items).__name__
        if classes is not None:
            self.classes = list(classes)

    @cached_property
    def classes(self) -> Sequence[str]:
        """Names by label. Without names, the labels of all items are read, once."""
        names = getattr(self.items, "classes", None)
        if names is not None and len(names):
            return [str(name[0]) if isinstance(name, tuple) else str(name) for name in names]
        last = max(self._labels(), default=-1)
        return [str(label) for label in range(last + 1)]

    def _labels(self) -> Iterator[int]:
        for key in LABELS:
            found = getattr(self.items, key, None)
            if found is not None and len(found) == len(self.items):
                for index, label in enumerate(found):
                    yield self._label(label, index)
                return
        if len(self.items) and _split(self.items[0])[1] is not None:
            for index in range(len(self.items)):
                yield self._label(_split(self.items[index])[1], index)

    def check_first_label(self) -> None:
        """Refuse labels that are not classes before images are read: there, an error is of one image.

        Raises:
            ValueError: if the first one is a number that is not whole.
        """
        label = None
        with suppress(Exception):  # the error of an item is reported where it is read as an image
            label = _split(self.items[0])[1]
        self._label(label, 0)

    def _label(self, label: Any, index: int) -> int:
        """A class number; -1 for what is none, such as a box, a missing label or NaN.

        Raises:
            ValueError: for a number that is not whole; it names the item.
        """
        if isinstance(label, str | bytes) or np.ndim(label):
            return -1
        try:
            number = float(label)
        except (TypeError, ValueError):  # None, an image, an object
            return -1
        if math.isnan(number):
            return -1
        if not number.is_integer():
            raise ValueError(
                f"{self.name(index)} has the label {number:g}. Labels are classes, as whole numbers, with -1 "
                f"for none: give these, or the images without labels, such as [item[0] for item in data]."
            )
        return int(label)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        image, label = _split(self.items[index])
        return as_image(image, self.channels, self.name(index)), self._label(label, index)

    def name(self, index: int) -> str:
        """The path of an image if that was given, else what it is in, with its number from 0."""
        if isinstance(self.items, list | tuple):
            image = _split(self.items[index])[0]
            file = image if isinstance(image, str | Path) else getattr(image, "filename", "")
            if file:
                return str(file)
        return f"{self.title} {index}"


def _split(item: Any) -> tuple[Any, Any]:
    """Image and label of an item; the label is None if it has none."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        return image, next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None
