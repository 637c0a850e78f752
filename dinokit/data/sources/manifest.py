"""Image files named in a list.

`.txt` holds one path a line; blank lines and lines that begin with # say nothing. `.csv` has a header with a
column `path` (or `file`, `image`, `filename`) and, if wanted, `label` and `split`. Paths that are not
absolute begin at the list's folder.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from dinokit.data.lines import Lines
from dinokit.data.names import Names
from dinokit.data.sources import ImageSource
from dinokit.data.sources._files import ImageFiles
from dinokit.data.sources._labels import Categorical, class_ids
from dinokit.data.sources._paths import existing, wrong_kind
from dinokit.data.sources._split import choose
from dinokit.data.sources._table import Column, read_table

_LOOK = 100  # files that are looked for when the list is opened; the rest when they are read


@dataclass
class Config:
    path: str = "???"
    split: Literal["all", "train", "test"] = "all"  # by the column `split` if there is one, else by a hash
    test_share: float = 0.1  # of images held out, where the list does not say
    channels: int = 3  # as backbone.channels


def build(cfg: Config) -> ImageSource:
    """Read the list.

    Raises:
        ValueError: if there is no such list, it is empty or not of this form, the first hundred files are all
            missing, or the split has no image.
    """
    path = existing(cfg.path)
    if path.is_dir() or path.suffix.lower() not in (".txt", ".csv"):
        raise wrong_kind(path, "a list of image files, .txt or .csv,")
    names: Lines | Column | Names
    if path.suffix.lower() == ".txt":
        names, labels, splits = Lines.of(path), Categorical(), Categorical()
    else:
        names, labels, splits = read_table(path)
    _look(path, names)
    classes, ids = class_ids(labels.codes, labels.words)
    said = (splits.codes, splits.words) if splits.words else None
    rows = choose(cfg.split, cfg.test_share, names, len(names), said, str(path))
    return ImageFiles(path.parent, names, rows, ids if labels.words else None, classes, cfg.channels)


def _look(path: Path, names: Lines | Column | Names) -> None:
    if not len(names):
        raise ValueError(f"{path} names no image file.")
    first = [path.parent / name for name in islice(names, _LOOK)]
    if not any(file.is_file() for file in first):
        raise ValueError(
            f"None of the first {len(first)} files that {path} names is there. '{names[0]}' was looked for "
            f"at {first[0].absolute()}: paths that are not absolute begin at the list's folder."
        )
