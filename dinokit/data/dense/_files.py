"""Pairs whose images and maps are files of their own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinokit.data.decode import SUFFIXES, decode, suffix
from dinokit.data.dense._maps import ClassMaps, DepthMaps, check_size
from dinokit.data.names import Names
from dinokit.data.sources import ImageLike
from dinokit.data.sources._paths import existing
from dinokit.data.sources._split import Rows


@dataclass
class PairedFiles:
    """Pairs by the names of their files, from two folders on."""

    images: Path
    maps: Path
    image_names: Names
    map_names: Names
    rows: Rows  # which of them belong to the split
    read: ClassMaps | DepthMaps
    channels: int

    def __post_init__(self) -> None:
        self.classes: Sequence[str] = self.read.classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        row = self.rows[index]
        path, of = self.images / self.image_names[row], self.maps / self.map_names[row]
        image = decode(path.read_bytes(), str(path), self.channels)
        target = self.read(of.read_bytes(), str(of))
        check_size(image, target, str(of))
        return image, target

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.images / self.image_names[self.rows[index]])


def pair_up(
    images: Path, maps: Path, image_end: str = "", map_end: str = "", below: Sequence[str] = ("",)
) -> tuple[Names, Names]:
    """Names of images and of their maps, from the two folders on, in the order of the images.

    A map has its image's name, but for the suffix and for `image_end`, in whose place it has `map_end`.

    Args:
        images: folder, looked through with all below it.
        maps: folder.
        image_end: what the stem of every image ends in; files without it are passed over.
        map_end: what the stem of every map ends in.
        below: the sub-folders to look into, the same on both sides.

    Raises:
        ValueError: if a folder is not there, there is no image, or an image or a map is without the other.
    """
    pictures, targets = (
        {key: name for part in below for key, name in _stems(root, part, end)}
        for root, end in ((images, image_end), (maps, map_end))
    )
    if not pictures:
        raise ValueError(f"{images} holds no image{f' whose name ends in {image_end}' if image_end else ''}.")
    for have, want, root, kind in (
        (targets, pictures, maps, "map"),
        (pictures, targets, images, "image"),
    ):
        missing = [name for key, name in want.items() if key not in have]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(want)} files have no {kind} of the same name in {root}: "
                f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. It holds "
                f"{', '.join(list(have.values())[:3]) or 'none'}{' and others' if len(have) > 3 else ''}. "
                f"Add what is missing, or move the others away."
            )
    return Names.of(pictures.values()), Names.of(targets[key] for key in pictures)


def from_list(lines: Iterable[str], where: str) -> tuple[Names, Names]:
    """Names of images and maps from lines `IMAGE MAP [anything]`; an image whose map is `None` has none.

    Raises:
        ValueError: if a line has one word alone, or no line is left; `where` is what the list is called.
    """
    words = [line.split() for line in lines if line.strip()]
    short = [" ".join(line) for line in words if len(line) < 2]
    if short:
        raise ValueError(f"{where}: a line is IMAGE MAP, but one reads: {short[0]}")
    kept = [line for line in words if line[1] != "None"]
    if not kept:
        raise ValueError(f"{where} names no image with a map.")
    images, maps = ([line[place].lstrip("/") for line in kept] for place in (0, 1))
    return Names.of(images), Names.of(maps)


def read_lines(path: Path) -> list[str]:
    """The lines of a list.

    Raises:
        ValueError: if it is not there; it says what is.
    """
    return existing(str(path)).read_text(encoding="utf-8").splitlines()


def parts(split: str, train: str, test: str) -> list[str]:
    """What a data set calls a split, or both of them for 'all'.

    Raises:
        ValueError: if there is no such split.
    """
    names = {"train": [train], "test": [test], "all": [train, test]}
    if split not in names:
        raise ValueError(f"split='{split}' is none of: {', '.join(names)}.")
    return names[split]


def _stems(root: Path, part: str, end: str) -> Iterable[tuple[str, str]]:
    """The path of each image file below `root` without suffix and `end`, and with them, in order."""
    folder = existing(str(root / part))
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder of images or maps is read here.")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(root).as_posix()
        stem = name[: len(name) - len(suffix(name))]
        hidden = any(word.startswith(".") for word in path.relative_to(folder).parts)
        if suffix(name) in SUFFIXES and stem.endswith(end) and not hidden and path.is_file():
            yield stem.removesuffix(end), name
