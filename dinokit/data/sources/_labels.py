"""Shared by sources: class labels from words, and the split of a data set into training and test images.

If the data set names the split of its images, that decides. Otherwise a share of the images is held out for
the test by a hash of their names, so an image stays in its split when others are added or removed. The two
splits never overlap, and together they are the whole data set.
"""

import re
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from os.path import commonpath
from pathlib import Path
from typing import Literal

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.files import Rows, encode

Split = Literal["all", "train", "test"]

_NO_LABEL = ("", "-1")  # for formats that always have a label
_TRAIN = frozenset({"train", "training"})
_TEST = frozenset({"test", "testing", "val", "valid", "validation", "dev", "eval"})


class Categorical:
    """A column of words, one for each image, stored as codes."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._codes = array("i")

    def add(self, word: str) -> None:
        """Append the word of the next image."""
        self._codes.append(self._number(word))

    def extend(self, codes: np.ndarray, words: Sequence[str]) -> None:
        """Append the words of the next images: image i has words[codes[i]]."""
        numbers = np.array([self._number(word) for word in words], np.intc)
        self._codes.frombytes(numbers[codes].tobytes())

    def _number(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers))

    @property
    def words(self) -> list[str]:
        """The different words, in the order of their first image."""
        return list(self._numbers)

    @property
    def codes(self) -> np.ndarray:
        """(n,) int32: image i has words[codes[i]]."""
        return np.array(self._codes, np.int32)


def class_ids(codes: np.ndarray, words: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The sorted classes, and the label of each image.

    Classes that are all integers are sorted as numbers, others as text. The words "" and "-1" mean that there
    is no label, as does a code of -1. All splits of a data set number their classes in the same way.

    Args:
        codes: (n,), the index of each image's word in `words`.
        words: class names, in any order.

    Returns:
        The class names by label; (n,) int32, -1 without a label.
    """
    names = [word for word in words if word not in _NO_LABEL]
    if all(name.removeprefix("-").isdecimal() for name in names):
        classes = sorted(names, key=int)
    else:
        classes = sorted(names)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number.get(word, -1) for word in words]
    return classes, np.array([*labels, -1], np.int32)[codes]  # the last entry is for a code of -1


def select_classes(
    classes: Sequence[str], labels: np.ndarray, names: Sequence[str], where: str
) -> tuple[list[str], np.ndarray]:
    """The classes in `names`, numbered in the order of `classes`; every other image gets the label -1.

    Args:
        classes: all, by label.
        labels: (n,), -1 without one.
        names: the classes to select.
        where: the data set, for messages.

    Raises:
        ValueError: if the data set has no such class.
    """
    for name in names:
        if name not in classes:
            have = ", ".join(classes[:20]) or "none: its images have no labels"
            raise ValueError(
                f"{where} has no class '{name}'.{suggest(name, list(classes))} Its classes are: {have}."
            )
    selected = [name for name in classes if name in names]
    number = np.full(len(classes) + 1, -1, np.int32)  # the last entry is for a label of -1
    number[[classes.index(name) for name in selected]] = np.arange(len(selected))
    return selected, number[labels]


def split_of(word: str) -> str:
    """'train', 'test' for any word that means held-out data, or '' for other words."""
    word = word.lower()
    return "train" if word in _TRAIN else "test" if word in _TEST else ""


def splits_of_folders(names: Iterable[str]) -> tuple[set[str], tuple[np.ndarray, list[str]] | None]:
    """The splits that the first folders of paths name ('' for none), and these folders as for choose_split().

    The folders are None unless both splits are among them.
    """
    folders = Categorical()
    for name in names:
        folders.add(name.partition("/")[0] if "/" in name else "")
    splits = {split_of(word) for word in folders.words}
    return splits, (folders.codes, folders.words) if {"train", "test"} <= splits else None


def splits_of_files(files: Sequence[Path]) -> list[str]:
    """The split of each file, by its name or a folder below their common one; all '' if names do not decide.

    Names decide only if both splits are among them: a single train.tar is a whole data set.

    Raises:
        ValueError: if both splits are among the names, but some files have none.
    """
    root = commonpath([file.parent for file in files])
    splits = [_split_of_path(file.relative_to(root)) for file in files]
    if not {"train", "test"} <= set(splits):
        return [""] * len(files)
    if "" in splits:
        raise ValueError(
            f"{files[splits.index('')]} has neither train nor test in its name, but other files beside it "
            f"have, such as {files[splits.index('test')]}. Rename it, or move it to another folder."
        )
    return splits


def choose_split(
    split: Split,
    share: float,
    names: Iterable[str],
    count: int,
    named: tuple[np.ndarray, Sequence[str]] | None,
    where: str,
) -> Rows:
    """The numbers of the images in `split`.

    Args:
        split: which.
        share: of the images to hold out, if the data set does not name splits.
        names: of all images; read only if they decide.
        count: of all images.
        named: the splits that the data set names: (count,) codes, and their words; None without.
        where: the data set, for messages.

    Raises:
        ValueError: if there is no such image, or only some of the data set's words are known.
    """
    if split == "all":
        return range(count)
    if split not in ("train", "test"):
        raise ValueError(f"split='{split}' is none of: all, train, test.")
    splits = [split_of(word) for word in named[1]] if named else []
    if named and any(splits):
        _check_all_known(*named, splits, where)
        held_out = np.array([name == "test" for name in splits])[named[0]]
        why = f"all its images are marked {' or '.join(map(repr, named[1]))}"
    else:
        limit = share * 2**64
        held_out = np.fromiter((_hash(name) < limit for name in names), np.bool_, count)
        why = f"test_share={share} of its {count} images is held out"
    rows = np.flatnonzero(held_out == (split == "test"))
    if not len(rows):
        raise ValueError(
            f"split='{split}' of {where} has no image: {why}. Set split=all, or use another data set."
        )
    return rows


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(encode(name), digest_size=8).digest(), "big")


def _split_of_path(path: Path) -> str:
    words = re.findall(r"[a-z]+", path.with_suffix("").as_posix().lower())
    return next((split for split in map(split_of, words) if split), "")


def _check_all_known(codes: np.ndarray, words: Sequence[str], splits: Sequence[str], where: str) -> None:
    unknown = [word or "nothing" for word, split in zip(words, splits, strict=True) if not split]
    if (codes < 0).any():
        unknown.append("nothing")
    if unknown:
        raise ValueError(
            f"{where} marks some images with {', '.join(map(repr, unknown[:5]))}, which is neither train "
            f"({', '.join(sorted(_TRAIN))}) nor test ({', '.join(sorted(_TEST))})."
        )
