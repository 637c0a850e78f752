"""Which images are for training and which are held out for a test: one rule for all formats.

If the data set says it, it is as it says. Otherwise a share of the images is held out by a hash of their
names, so an image stays on its side when others come or go. The sides never overlap, and together they are
all.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from os.path import commonpath
from pathlib import Path
from typing import Literal

import numpy as np

from dinokit.data.names import encode

Split = Literal["all", "train", "test"]
Rows = range | np.ndarray  # numbers of images

_TRAIN = frozenset({"train", "training"})
_TEST = frozenset({"test", "testing", "val", "valid", "validation", "dev", "eval"})


def side(word: str) -> str:
    """'train', 'test' for a word that means held out, or '' for any other word."""
    word = word.lower()
    return "train" if word in _TRAIN else "test" if word in _TEST else ""


def sides_of_files(files: Sequence[Path]) -> list[str]:
    """The side that a file's name, or a folder's below what all files share, says; all '' if they say none.

    Names decide only if they tell two sides apart: a lone train.tar is a whole data set.

    Raises:
        ValueError: if some names tell the sides apart and others say nothing.
    """
    root = commonpath([file.parent for file in files])
    sides = [_side_of(file.relative_to(root)) for file in files]
    if not {"train", "test"} <= set(sides):
        return [""] * len(files)
    if "" in sides:
        raise ValueError(
            f"{files[sides.index('')]} says neither train nor test, but other files beside it do, as "
            f"{files[sides.index('test')]}. Name it for its side, or take it out."
        )
    return sides


def choose(
    split: Split,
    share: float,
    names: Iterable[str],
    count: int,
    said: tuple[np.ndarray, Sequence[str]] | None,
    where: str,
) -> Rows:
    """The numbers of the images in `split`.

    Args:
        split: which.
        share: of images to hold out, if the data set does not say.
        names: of all images; walked through only if they decide.
        count: how many there are.
        said: what the data set says: (count,) codes, and the words that they number; None if it says nothing.
        where: what to call the data set in messages.

    Raises:
        ValueError: if there is no such image, or the data set says words of which only some are known.
    """
    if split == "all":
        return range(count)
    if split not in ("train", "test"):
        raise ValueError(f"split='{split}' is none of: all, train, test.")
    sides = [side(word) for word in said[1]] if said else []
    if said and any(sides):
        _refuse_unknown(*said, sides, where)
        held_out = np.array([name == "test" for name in sides])[said[0]]
        why = f"it says of all that they are for {' or '.join(map(repr, said[1]))}"
    else:
        limit = share * 2**64
        held_out = np.fromiter((_hash(name) < limit for name in names), np.bool_, count)
        why = f"test_share={share} of its {count} images is held out"
    rows = np.flatnonzero(held_out == (split == "test"))
    if not len(rows):
        raise ValueError(
            f"split='{split}' of {where} has no image: {why}. Take split=all or another data set."
        )
    return rows


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(encode(name), digest_size=8).digest(), "big")


def _side_of(path: Path) -> str:
    words = re.findall(r"[a-z]+", path.with_suffix("").as_posix().lower())
    return next((found for found in map(side, words) if found), "")


def _refuse_unknown(codes: np.ndarray, words: Sequence[str], sides: Sequence[str], where: str) -> None:
    unknown = [word or "nothing" for word, known in zip(words, sides, strict=True) if not known]
    if (codes < 0).any():
        unknown.append("nothing")
    if unknown:
        raise ValueError(
            f"{where} says of some images that they are for {', '.join(map(repr, unknown[:5]))}, which is "
            f"neither train ({', '.join(sorted(_TRAIN))}) nor test ({', '.join(sorted(_TEST))})."
        )
