"""Images with the masks of their objects, which may overlap. A registry: a file is a layout.

A file defines `Config`, a dataclass with a field `split`, one of "all", "train", "test", and

    build(cfg: Config) -> ObjectSource

Opening must be cheap, and an ObjectSource must pickle. Masks are run lengths (dinokit.data.objects.rle): an
image of SA-1B has about a hundred masks, and a step of training decodes a few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol

import numpy as np

from dinokit.data.decode import ImageLike
from dinokit.data.objects.rle import Rle, decode, encode
from dinokit.data.transforms import size_of

LARGEST = 0.9  # share of an image above which a mask is no object (SAM, arXiv 2304.02643, appendix A)


@dataclass(frozen=True)
class Objects:
    """The masks of one image, and the class of each."""

    size: tuple[int, int]  # height, width of the image
    rles: Sequence[Rle]
    labels: Sequence[int]  # ids of classes; -1: not known

    def __len__(self) -> int:
        return len(self.rles)

    def mask(self, number: int) -> np.ndarray:
        """The mask of one object, (H, W) bool."""
        return decode(self.rles[number])

    def chosen(self, min_area: int) -> list[int]:
        """The numbers of the objects to learn from: of `min_area` pixels or more, not the whole image."""
        most = LARGEST * self.size[0] * self.size[1]
        return [i for i, rle in enumerate(self.rles) if min_area <= rle.area <= most]


class ObjectSource(Protocol):
    """Images with the masks of their objects, by number, in an order that never changes."""

    classes: Sequence[str]  # names by label

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, Objects]:
        """The decoded image and its objects, which may be none.

        Raises:
            OSError, ValueError: if either cannot be read, or their sizes differ.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...


def objects_of_ids(ids: np.ndarray, labels: dict[int, int] | None = None) -> Objects:
    """The objects of a map of numbers (H, W), 0 where there is none; each number is an object.

    Args:
        ids: the map.
        labels: of the numbers; None: every object has label 0.
    """
    numbers = [int(number) for number in np.unique(ids) if number > 0]
    rles = [encode(ids == number) for number in numbers]
    return Objects(
        (ids.shape[0], ids.shape[1]), rles, [0 if labels is None else labels[number] for number in numbers]
    )


def check_objects(image: ImageLike, objects: Objects, name: str) -> None:
    """Refuse masks that have another size than their image.

    Raises:
        ValueError: with `name`, if the sizes differ.
    """
    width, height = size_of(image)
    for size in (objects.size, *(rle.size for rle in objects.rles)):
        if size != (height, width):
            raise ValueError(
                f"{name}: the masks have {size[1]} x {size[0]} pixels, the image {width} x "
                f"{height}: store them in one size, and the image without an EXIF orientation."
            )


def ndimage() -> ModuleType:
    """scipy.ndimage: distances within masks and their connected parts.

    Raises:
        ValueError: if scipy is not installed.
    """
    try:
        return import_module("scipy.ndimage")
    except ModuleNotFoundError:
        raise ValueError(
            "Clicks and connected parts of masks need scipy, which is not installed: "
            "pip install '.[segment]' in the clone."
        ) from None
