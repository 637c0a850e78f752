"""Dense datasets: images with a map of the class or the depth of every pixel. A registry: a file is a layout.

A file defines `Config`, a dataclass with a field `split`, one of "all", "train", "test", and

    build(cfg: Config) -> DenseSource

A Config with a field `target` reads either map, "mask" or "depth"; the evaluator sets it. Opening must be
cheap, and a DenseSource must pickle (loader processes receive a copy). Layouts share what is below: maps as
class ids or metres, and files of images and maps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dinokit.data.decode import SUFFIXES, ImageLike, decode, decode_map, suffix
from dinokit.data.files import Names, Rows, existing
from dinokit.data.transforms import size_of
from dinokit.runtime.files import read_regular

IGNORE = -1  # the class id of pixels that are not evaluated
_IDS = 1 << 16  # different numbers in a map of 16 bits
_UNKNOWN = -2


class DenseSource(Protocol):
    """Images with a map each, by number, in an order that never changes."""

    classes: Sequence[str]  # names by id; empty for depth maps

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        """The decoded image and its map (H, W), of the image's size.

        The map is int16 with class ids, IGNORE where pixels are not evaluated; or float32 with metres, 0
        where there is no depth.

        Raises:
            OSError, ValueError: if either cannot be read, their sizes differ, or an id is not a class.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """Reads maps of class ids."""

    table: np.ndarray  # (65536,) int16: the class of each stored number, IGNORE, or _UNKNOWN
    classes: Sequence[str]

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """(H, W) int16, as in DenseSource.

        Raises:
            ValueError: if the file is damaged, or has a number that is no class.
        """
        stored = decode_map(data, name)
        if stored.dtype.kind == "f":
            raise ValueError(f"{name} has {stored.dtype} numbers; class ids are integers.")
        if stored.min() < 0 or stored.max() >= _IDS:
            raise ValueError(f"{name} has ids from {stored.min()} to {stored.max()}; they must fit 16 bits.")
        ids = self.table[stored]
        if (ids == _UNKNOWN).any():
            wrong = sorted(set(stored[ids == _UNKNOWN].tolist()))
            raise ValueError(
                f"{name} has the id{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong[:8]))}, and "
                f"there are {len(self.classes)} classes{self._id_range()}. List all classes in `classes`, or "
                f"the ids to ignore in `ignore`."
            )
        return ids

    def _id_range(self) -> str:
        known = np.flatnonzero(self.table >= 0)
        return f", stored as {known.min()} to {known.max()}" if len(known) == len(self.classes) else ""


@dataclass(frozen=True)
class DepthMaps:
    """Reads maps of depth."""

    scale: float  # stored units per metre, above 0
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(
                f"depth_scale={self.scale}: it is the stored units per metre, 1000 for millimetres."
            )

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """(H, W) float32 metres, as in DenseSource.

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
        ignore: stored numbers of pixels that are not evaluated.
        reduce_zero_label: 0 is ignored too, and class i is stored as i + 1, as in ADE20K.
        ids: the class of each stored number, if they differ.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    if len(classes) < 2:
        raise ValueError(
            f"`classes` has {len(classes)} name(s): list the names of all classes in the order of their ids, "
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


def check_size(image: ImageLike, target: np.ndarray, name: str) -> None:
    """Refuse a map that has another size than its image.

    Raises:
        ValueError: with `name`, if the sizes differ.
    """
    width, height = size_of(image)
    if target.shape != (height, width):
        raise ValueError(
            f"{name}: the map has {target.shape[1]} x {target.shape[0]} pixels, its image {width} x {height}"
            f": store them in one size."
        )


@dataclass
class CheckedMaps:
    """A dense source of another package: its maps are checked as those of files are."""

    source: Any

    def __post_init__(self) -> None:
        self.classes: Sequence[str] = self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        image, target = self.source[index]
        target, name = np.asarray(target), self.name(index)
        if target.ndim != 2:
            raise ValueError(f"{name}: a map is (h, w), and this has the shape {target.shape}.")
        check_size(image, target, name)
        if not self.classes:
            return image, target.astype(np.float32)
        if wrong := sorted({*np.unique(target).tolist()} - {IGNORE, *range(len(self.classes))}):
            raise ValueError(
                f"{name}: the map has {', '.join(map(str, wrong[:8]))}, and the classes are 0 to "
                f"{len(self.classes) - 1}; {IGNORE} is for pixels that do not count."
            )
        return image, target.astype(np.int16)

    def name(self, index: int) -> str:
        """As that of the source."""
        return str(self.source.name(index))

    def __getattr__(self, key: str) -> Any:
        if key == "source":  # while it is unpickled
            raise AttributeError(key)
        return getattr(self.source, key)  # what a source may have, such as file()


@dataclass
class DenseFiles:
    """A dense source of image files and map files, by their names below two folders."""

    images: Path
    maps: Path
    image_names: Names
    map_names: Names
    rows: Rows  # which of them belong to the split
    read_map: ClassMaps | DepthMaps
    channels: int

    def __post_init__(self) -> None:
        self.classes: Sequence[str] = self.read_map.classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        row = self.rows[index]
        path, map_path = self.images / self.image_names[row], self.maps / self.map_names[row]
        # As stored: a map has no EXIF orientation, and lies as the pixels of its image do.
        image = decode(read_regular(path), str(path), self.channels, orient="stored")
        target = self.read_map(read_regular(map_path), str(map_path))
        check_size(image, target, str(map_path))
        return image, target

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """The path of the image."""
        return self.images / self.image_names[self.rows[index]]

    def stored(self, index: int) -> bytes:
        """The content of the image file."""
        return read_regular(self.file(index))


def match_files(
    images: Path, maps: Path, image_end: str = "", map_end: str = "", folders: Sequence[str] = ("",)
) -> tuple[Names, Names]:
    """Names of images and of their maps, relative to the two folders, in the order of the images.

    A map has the name of its image, but for the suffix, and with `map_end` in place of `image_end`.

    Args:
        images: folder, searched with its sub-folders.
        maps: folder.
        image_end: the end of the stem of every image; other files are ignored.
        map_end: the end of the stem of every map.
        folders: the sub-folders to search, the same in both folders.

    Raises:
        ValueError: if a folder is missing, there is no image, or an image or a map has no counterpart.
    """
    image_of, map_of = (
        {stem: name for folder in folders for stem, name in _stems(root, folder, end)}
        for root, end in ((images, image_end), (maps, map_end))
    )
    if not image_of:
        raise ValueError(f"{images} has no image{f' whose name ends in {image_end}' if image_end else ''}.")
    for have, need, root, kind in ((map_of, image_of, maps, "map"), (image_of, map_of, images, "image")):
        missing = [name for stem, name in need.items() if stem not in have]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(need)} files have no {kind} of the same name in {root}: "
                f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. It contains "
                f"{', '.join(list(have.values())[:3]) or 'none'}{' and others' if len(have) > 3 else ''}. "
                f"Add the missing files, or move the others away."
            )
    return Names.of(image_of.values()), Names.of(map_of[stem] for stem in image_of)


def _stems(root: Path, folder: str, end: str) -> Iterable[tuple[str, str]]:
    """(path without suffix and `end`, path) of each image file in a folder below `root`, in order."""
    top = existing(str(root / folder))
    if not top.is_dir():
        raise ValueError(f"{top} is a file; it must be a folder of images or maps.")
    for path in sorted(top.rglob("*")):
        name = path.relative_to(root).as_posix()
        stem = name[: len(name) - len(suffix(name))]
        hidden = any(word.startswith(".") for word in path.relative_to(top).parts)
        if suffix(name) in SUFFIXES and stem.endswith(end) and not hidden and path.is_file():
            yield stem.removesuffix(end), name


def read_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: if it does not exist; the message has the nearest folder's content.
    """
    return existing(str(path)).read_text(encoding="utf-8").splitlines()


def split_names(split: str, train: str, test: str) -> list[str]:
    """What a data set calls a split, or both of them for 'all'.

    Raises:
        ValueError: if there is no such split.
    """
    names = {"train": [train], "test": [test], "all": [train, test]}
    if split not in names:
        raise ValueError(f"split='{split}' is none of: {', '.join(names)}.")
    return names[split]


def listed_depth(cfg: Any) -> DenseSource:
    """The images and depth maps that lists name, by the Config of kitti, nyu or sunrgbd.

    An image whose map is `None` is left out.

    Raises:
        ValueError: if a list is missing or names no image with a map, or the first files do not exist.
    """
    root = Path(cfg.path).expanduser()
    files = [root / name for name in split_names(cfg.split, cfg.train, cfg.test)]
    where = " and ".join(map(str, files))
    words = [line.split() for file in files for line in read_lines(file) if line.strip()]
    short = [" ".join(line) for line in words if len(line) < 2]
    if short:
        raise ValueError(f"{where}: a line must be IMAGE MAP, but one is: {short[0]}")
    words = [line for line in words if line[1] != "None"]
    if not words:
        raise ValueError(f"{where} names no image with a map.")
    images, maps = (Names.of(line[column].lstrip("/") for line in words) for column in (0, 1))
    for path in (root / cfg.images / images[0], root / cfg.maps / maps[0]):
        if not path.is_file():
            raise ValueError(f"{files[0]} names {path}, which does not exist: set the folder that it is in.")
    return DenseFiles(
        root / cfg.images, root / cfg.maps, images, maps,
        range(len(images)), DepthMaps(cfg.depth_scale), cfg.channels,
    )  # fmt: skip
