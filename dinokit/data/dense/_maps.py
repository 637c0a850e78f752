"""From the numbers in a map's file to class ids or metres, and what is said of those that cannot be right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dinokit.data.decode import decode_map
from dinokit.data.dense import IGNORE
from dinokit.data.sources import ImageLike

_IDS = 1 << 16  # numbers that a map of 16 bits can hold
_UNKNOWN = -2


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """Reads maps of class ids."""

    table: np.ndarray  # (65536,) int16: the class of each stored number, IGNORE, or _UNKNOWN
    classes: Sequence[str]

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """(H, W) int16, as Pairs.

        Raises:
            ValueError: if the file is damaged, or holds a number that is no class.
        """
        stored = decode_map(data, name)
        if stored.dtype.kind == "f":
            raise ValueError(f"{name} holds {stored.dtype} numbers; class ids are whole numbers.")
        if stored.min() < 0 or stored.max() >= _IDS:
            raise ValueError(
                f"{name} holds ids from {stored.min()} to {stored.max()}; they must fit 16 bits."
            )
        ids = self.table[stored]
        if (ids == _UNKNOWN).any():
            wrong = sorted(set(stored[ids == _UNKNOWN].tolist()))
            raise ValueError(
                f"{name} holds the id{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong[:8]))}, and "
                f"there are {len(self.classes)} classes{_numbered(self.table, self.classes)}. Give all "
                f"classes in `classes`, or what is not to be judged in `ignore`."
            )
        return ids


@dataclass(frozen=True)
class DepthMaps:
    """Reads maps of depth."""

    scale: float  # stored units in a metre
    classes: Sequence[str] = ()

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """(H, W) float32 metres, as Pairs.

        Raises:
            ValueError: if the file is damaged.
        """
        metres = decode_map(data, name).astype(np.float32) / np.float32(self.scale)
        return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))


def class_maps(
    classes: Sequence[str],
    ignore: Sequence[int] = (255,),
    reduce_zero_label: bool = False,
    ids: Mapping[int, int] | None = None,
) -> ClassMaps:
    """The reader of maps that store class ids.

    Args:
        classes: names by id.
        ignore: stored numbers that are not judged.
        reduce_zero_label: 0 is not judged either, and class i is stored as i + 1, as in ADE20K.
        ids: the class of each stored number, where they are not the classes themselves.

    Raises:
        ValueError: if there are fewer than two classes: there is nothing to tell apart.
    """
    if len(classes) < 2:
        raise ValueError(
            f"`classes` has {len(classes)} name(s): give the names of all classes in the order of their ids, "
            f"such as classes=[background,cat]."
        )
    table = np.full(_IDS, _UNKNOWN, np.int16)
    if ids is None:
        first = 1 if reduce_zero_label else 0
        ids = {number + first: number for number in range(len(classes))}
    for number, label in ids.items():
        table[number] = label
    for number in (*ignore, *([0] if reduce_zero_label else [])):
        table[number] = IGNORE
    return ClassMaps(table, tuple(classes))


def depth_maps(scale: float) -> DepthMaps:
    """The reader of maps that store depth, `scale` units a metre.

    Raises:
        ValueError: if the scale is not above 0.
    """
    if scale <= 0:
        raise ValueError(f"depth_scale={scale}: it is the stored units in a metre, 1000 for millimetres.")
    return DepthMaps(scale)


def check_size(image: ImageLike, target: np.ndarray, name: str) -> None:
    """Hold an image and its map, called `name`, together.

    Raises:
        ValueError: if their sizes differ.
    """
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    if target.shape != (height, width):
        raise ValueError(
            f"{name}: the map has {target.shape[1]} x {target.shape[0]} pixels, its image {width} x {height}"
            f": store them in one size."
        )


def _numbered(table: np.ndarray, classes: Sequence[str]) -> str:
    known = np.flatnonzero(table >= 0)
    return f", stored as {known.min()} to {known.max()}" if len(known) == len(classes) else ""
