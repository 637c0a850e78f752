"""A tree of image files.

The order is by name, folder after folder, and the same on every file system. Hidden files and folders are
ignored; links are followed, but never in a circle. The tree is searched at every start: if that takes long,
write the paths into a manifest once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import DirEntry, scandir
from pathlib import Path
from typing import Literal

import numpy as np

from dinokit.data.decode import SUFFIXES, suffix
from dinokit.data.files import ImageFiles, Names, existing, nothing_found, report_left_out, wrong_kind
from dinokit.data.sources import (
    Categorical,
    ImageSource,
    choose_split,
    class_ids,
    split_of,
    splits_of_folders,
)


@dataclass
class Config:
    path: str = "???"
    labels: Literal["none", "folders"] = "none"  # folders: the first one, or the one below train/ and test/
    split: Literal["all", "train", "test"] = "all"  # by folders train/ and test/ or val/, else by a hash
    test_share: float = 0.1  # of images held out, if the folders name no splits
    channels: int = 3  # as backbone.channels
    max_pixels: int = 89_478_485  # of an image; one with more is unreadable
    orient: Literal["exif", "stored"] = "exif"  # turn images upright by EXIF, or leave them as stored


def build(cfg: Config) -> ImageSource:
    """Search the folder.

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
    report_left_out(root, others)
    splits, named = splits_of_folders(names)
    rows = choose_split(cfg.split, cfg.test_share, names, len(names), named, str(root))
    if cfg.labels == "none":
        return ImageFiles(root, names, rows, None, [], cfg.channels, cfg.max_pixels, cfg.orient)
    classes, labels = _labels(names, 1 if named or "" not in splits else 0, root)
    return ImageFiles(root, names, rows, labels, classes, cfg.channels, cfg.max_pixels, cfg.orient)


def _labels(names: Names, depth: int, root: Path) -> tuple[list[str], np.ndarray]:
    folders = Categorical()
    for name in names:
        path = name.split("/")
        if len(path) < depth + 2 or (depth and not split_of(path[0])):
            where = "a folder of its class below train/ or test/" if depth else "a folder of its class"
            raise ValueError(
                f"labels=folders, but {root / name} is not in {where}. Move it, or set labels=none."
                f"{_too_deep(root)}"
            )
        folders.add(path[depth])
    return class_ids(folders.codes, folders.words)


def _too_deep(root: Path) -> str:
    """A sentence if the folder looks like that of one class, beside those of others."""
    beside = sorted(path.name for path in root.resolve().parent.iterdir() if path.is_dir())
    if len(beside) < 2 or any(path.is_dir() for path in root.iterdir()):
        return ""
    return (
        f" Is {root} the folder of one class? Then give the folder above it, {root.parent}, which has: "
        f"{', '.join(beside[:5])}{', ...' if len(beside) > 5 else ''}."
    )


def _images(
    folder: Path, inside: str, above: frozenset[tuple[int, int]], others: Counter[str]
) -> Iterator[str]:
    """The images below `folder`, as paths that begin with `inside`; counts the suffixes of other files."""
    status = folder.stat()
    inode = (status.st_dev, status.st_ino)
    if inode in above:
        return
    with scandir(folder) as entries:
        found = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in found:
        if is_folder:
            yield from _images(folder / name, f"{inside}{name}/", above | {inode}, others)
        elif suffix(name) in SUFFIXES:
            yield inside + name
        else:
            others[suffix(name)] += 1


def _is_folder(entry: "DirEntry[str]") -> bool:
    # For a link to itself, Path.is_dir() is False, and that of a DirEntry raises.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()
