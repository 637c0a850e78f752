"""From the words that a data set says of its images (a class, a split) to numbers."""

from array import array
from collections.abc import Sequence

import numpy as np

from dinokit.config.registry import suggest

_NONE = ("", "-1")  # what stands for "no label" in the formats that have a place for one anyway


class Categorical:
    """One word an image, met one by one and kept as a number each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._codes = array("i")

    def add(self, word: str) -> None:
        """The word of the next image."""
        self._codes.append(self._number(word))

    def extend(self, codes: np.ndarray, words: Sequence[str]) -> None:
        """The words of the next images: image i has words[codes[i]]."""
        numbers = np.array([self._number(word) for word in words], np.intc)
        self._codes.frombytes(numbers[codes].tobytes())

    def _number(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers))

    @property
    def words(self) -> list[str]:
        """The different words, in the order in which they were met."""
        return list(self._numbers)

    @property
    def codes(self) -> np.ndarray:
        """(n,) int32: image i has words[codes[i]]."""
        return np.array(self._codes, np.int32)


def class_ids(codes: np.ndarray, words: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The sorted classes, and the label of each image.

    Classes that are all whole numbers are sorted as numbers, others as text. The words "" and "-1" mean that
    there is no label, as does a code of -1. Every split is numbered by the classes of all of them.

    Args:
        codes: (n,), the place of each image's word in `words`.
        words: class names, in any order.

    Returns:
        The class names by label; (n,) int32, -1 without a label.
    """
    names = [word for word in words if word not in _NONE]
    if all(name.removeprefix("-").isdecimal() for name in names):
        classes = sorted(names, key=int)
    else:
        classes = sorted(names)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number.get(word, -1) for word in words]
    return classes, np.array([*labels, -1], np.int32)[codes]  # the last place is for a code of -1


def only(
    classes: Sequence[str], labels: np.ndarray, wanted: Sequence[str], where: str
) -> tuple[list[str], np.ndarray]:
    """The wanted classes, numbered in the order of `classes`; -1 for the label of every other image.

    Args:
        classes: all, by label.
        labels: (n,), -1 without one.
        wanted: names of some.
        where: what to call the data set in messages.

    Raises:
        ValueError: if the data set has no such class.
    """
    for name in wanted:
        if name not in classes:
            there = ", ".join(classes[:20]) or "none: its images have no labels"
            raise ValueError(
                f"{where} has no class '{name}'.{suggest(name, list(classes))} Its classes are: {there}."
            )
    kept = [name for name in classes if name in wanted]
    number = np.full(len(classes) + 1, -1, np.int32)  # the last place is for a label of -1
    number[[classes.index(name) for name in kept]] = np.arange(len(kept))
    return kept, number[labels]
