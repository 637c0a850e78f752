"""A tree of image files, found by looking through it.

The order is by name, folder after folder, and the same on every file system. Hidden files and folders are
passed over; links are followed, but never in a circle. The tree is walked at every start: where that takes
long, write the paths into a manifest once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import DirEntry, scandir
from pathlib import Path
from typing import Literal

import numpy as np

from dinokit.data.decode import SUFFIXES, suffix
from dinokit.data.names import Names
from dinokit.data.sources import ImageSource
from dinokit.data.sources._files import ImageFiles
from dinokit.data.sources._labels import Categorical, class_ids
from dinokit.data.sources._paths import existing, nothing_found, wrong_kind
from dinokit.data.sources._split import choose, side


@dataclass
class Config:
    path: str = "???"
    labels: Literal["none", "folders"] = "none"  # folders: the first one, or the one below train/ and test/
    split: Literal["all", "train", "test"] = "all"  # by folders train/ and test/ or val/, else by a hash
    test_share: float = 0.1  # of images held out, where the folders do not say
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> ImageSource:
    """Look through the folder.

    Raises:
        ValueError: if there is no such folder, no image in it, none in the split, or an image outside of all
            class folders where they give the labels.
    """
    root = existing(cfg.path)
    if not root.is_dir():
        raise wrong_kind(root, "a folder of image files")
    others: Counter[str] = Counter()
    names = Names.of(_images(root, "", frozenset(), others))
    if not len(names):
        raise nothing_found(root, SUFFIXES, others)
    tops = Categorical()
    for name in names:
        tops.add(name.partition("/")[0] if "/" in name else "")
    sides = {side(word) for word in tops.words}
    both = {"train", "test"} <= sides
    said = (tops.codes, tops.words) if both else None
    rows = choose(cfg.split, cfg.test_share, names, len(names), said, str(root))
    if cfg.labels == "none":
        return ImageFiles(root, names, rows, None, [], cfg.channels)
    classes, labels = _labels(names, 1 if both or "" not in sides else 0, root)
    return ImageFiles(root, names, rows, labels, classes, cfg.channels)


def _labels(names: Names, depth: int, root: Path) -> tuple[list[str], np.ndarray]:
    folders = Categorical()
    for name in names:
        parts = name.split("/")
        if len(parts) < depth + 2 or (depth and not side(parts[0])):
            where = "a folder of its class below train/ or test/" if depth else "a folder of its class"
            raise ValueError(
                f"labels=folders, but {root / name} does not lie in {where}. Move it, or set labels=none."
            )
        folders.add(parts[depth])
    return class_ids(folders.codes, folders.words)


def _images(
    folder: Path, inside: str, above: frozenset[tuple[int, int]], others: Counter[str]
) -> Iterator[str]:
    """The images below `folder`, as paths that begin with `inside`; counts the suffixes of other files."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with scandir(folder) as entries:
        found = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in found:
        if is_folder:
            yield from _images(folder / name, f"{inside}{name}/", above | {here}, others)
        elif suffix(name) in SUFFIXES:
            yield inside + name
        else:
            others[suffix(name)] += 1


def _is_folder(entry: "DirEntry[str]") -> bool:
    # Of a link to itself, a Path says no, and a DirEntry raises.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()
