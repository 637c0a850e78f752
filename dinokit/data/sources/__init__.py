"""Image sources: where images come from. A registry: a file here is a `data.name` in a recipe.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> ImageSource

Opening a source must be cheap, and it must pickle (loader processes receive a copy). A source with labels has
a field `split` in its Config, one of "all", "train", "test".

Below are what sources share: labels from words, and the split. If a data set names the split of its images,
that decides. Otherwise a share of the images is held out for the test by a hash of their names, so an image
stays in its split when others are added or removed. The two splits never overlap, and together they are the
whole data set.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from os.path import commonpath
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import ImageLike as ImageLike
from dinokit.data.files import Rows, encode

READ, AMONG, DRAWN = 2_000, 20_000, 200  # images whose content is compared, with how many, if no file has it
_shared: dict[tuple[str, str], list[int]] = {}  # by two stamps: an evaluation repeats while a run trains
Split = Literal["all", "train", "test"]

_NO_LABEL = ("", "-1")  # for formats that always have a label
_TRAIN = frozenset({"train", "training"})
_TEST = frozenset({"test", "testing", "val", "valid", "validation", "dev", "eval"})


class ImageSource(Protocol):
    """Images by number, in an order that never changes.

    Optional methods:

        stamp() -> str            changes whenever an image, a label or their order may have changed
                                  (dinokit.data.files.stamp_of helps); needed to cache features on disk
        file(index) -> Path       the file of an image, if each image is a file of its own
        stored(index) -> bytes    the content of the image file, alone or inside another file; needed for
                                  crops.decode=reduced
        stored_size(index) -> int its bytes, if that is known without reading them
    """

    classes: Sequence[str]  # names by label; empty if the source has no labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The decoded image and its label, -1 without one.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...


def images_stamp(source: ImageSource) -> str | None:
    """A text that changes whenever an image of the source may have changed; None if the source has none."""
    stamp = getattr(source, "stamp", None)
    text = stamp() if stamp is not None else None
    return None if text is None else str(text)


def shared_images(train: Any, test: Any) -> list[int]:
    """The numbers of those images of `test` that are images of `train` too, in ascending order.

    Both are sources of images, dense ones too. One file under two paths (links, `a/../b`) is found always.
    Equal contents are found among READ images of `test`, drawn evenly where there are more, and those of
    `train` with the same number of bytes, at most AMONG. Of images without files, DRAWN of `test` compare
    in pixels with those of `train` of the same names and DRAWN others.
    """
    key = str(images_stamp(train)), str(images_stamp(test))
    if key not in _shared or "None" in key:
        same_place = _by_place(train, test)
        _shared[key] = sorted({*same_place, *_by_content(train, test)})
    return _shared[key]


def _by_place(train: Any, test: Any) -> set[int]:
    places = {_place(train, i) for i in range(len(train))} - {None}
    return {i for i in range(len(test)) if _place(test, i) in places}


def _place(source: Any, index: int) -> tuple[int, int] | None:
    """The file system's number of an image's file; None if there is none."""
    try:
        status = Path(source.file(index)).stat()
    except (AttributeError, OSError):
        return None
    return status.st_dev, status.st_ino


def _by_content(train: Any, test: Any) -> set[int]:
    if not (hasattr(train, "stored") and hasattr(test, "stored")):
        drawn = _evenly(range(len(test)), DRAWN)
        names = {str(test.name(i)) for i in drawn}
        same = [i for i in range(len(train)) if str(train.name(i)) in names]
        compared = {*same[:DRAWN], *_evenly(range(len(train)), DRAWN)}
        digests = {_digest_of(train, i, _pixels) for i in compared} - {""}
        return {i for i in drawn if _digest_of(test, i, _pixels) in digests}
    sizes, of_train = _sizes(test), _sizes(train)
    tried = _evenly(np.flatnonzero(np.isin(sizes, of_train) & (sizes > 0)), READ)
    among = _evenly(np.flatnonzero(np.isin(of_train, sizes[tried])), AMONG)
    digests = {_digest_of(train, i, _content) for i in among} - {""}
    return {i for i in tried if _digest_of(test, i, _content) in digests}


def _evenly(numbers: Sequence[int] | np.ndarray, most: int) -> list[int]:
    n = len(numbers)
    return [int(numbers[i * n // min(n, most)]) for i in range(min(n, most))]


def image_states(source: Any, images: Sequence[int]) -> tuple[list[int], list[int]]:
    """Bytes and modification times (ns) of the files of images; 0 for what is not known without reading."""
    sizes, times = [0] * len(images), [0] * len(images)
    for row, i in enumerate(images):
        with suppress(OSError):
            if hasattr(source, "file"):
                status = Path(source.file(i)).stat()
                sizes[row], times[row] = status.st_size, status.st_mtime_ns
            elif hasattr(source, "stored_size"):
                sizes[row] = source.stored_size(i)
    return sizes, times


def sizes_hash(source: Any) -> str | None:
    """A hash of the bytes of each image, which changes with nearly every change of one; None if unknown.

    Times and places are not in it: copied or moved images have the same one.
    """
    sizes = image_states(source, range(len(source)))[0]
    return blake2b(repr(sizes).encode(), digest_size=16).hexdigest() if any(sizes) else None


def content_hash(source: Any, index: int) -> str:
    """A hash of the stored content of an image; "" if it has none, or cannot be read."""
    return _digest_of(source, index, _content)


def _sizes(source: Any) -> np.ndarray:
    """The bytes of each image (n,); 0 for one that cannot be read."""
    if hasattr(source, "file") or hasattr(source, "stored_size"):
        return np.array(image_states(source, range(len(source)))[0], np.int64)
    sizes = np.zeros(len(source), np.int64)
    for i in range(len(source)):
        with suppress(OSError, ValueError):
            sizes[i] = len(source.stored(i))
    return sizes


def _content(source: Any, index: int) -> bytes:
    return bytes(source.stored(index))


def _pixels(source: Any, index: int) -> bytes:
    array = np.asarray(source[index][0])
    return repr(array.shape).encode() + array.tobytes()


def _digest_of(source: Any, index: int, read: Callable[[Any, int], bytes]) -> str:
    """A hash of an image; "" if it cannot be read, which is reported elsewhere."""
    try:
        return blake2b(read(source, index), digest_size=16).hexdigest()
    except (AttributeError, OSError, ValueError):
        return ""


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


def whole_labels(numbers: np.ndarray, column: str, where: str) -> np.ndarray:
    """Labels that are stored as floats, as classes: 2.0 is the class 2, and NaN is no label.

    Args:
        numbers: (n,) floats, by row.
        column: that they are in, for messages.
        where: the data set, for messages.

    Returns:
        (n,) int64, -1 without a label.

    Raises:
        ValueError: for one that is not whole, such as an age or a rating: each would be a class of its own.
    """
    numbers = np.where(np.isnan(numbers), -1.0, numbers)
    wrong = np.flatnonzero((numbers != np.floor(numbers)) | (np.abs(numbers) > 2**53))
    if len(wrong):
        raise ValueError(
            f"Column '{column}' of {where} has {len(wrong)} label(s) that are not whole numbers. The first "
            f"is {numbers[wrong[0]]:g}, in row {wrong[0]} (the first row is 0). Labels are classes, as whole "
            f"numbers or words: set label=COLUMN for another column, or label= to leave the labels out."
        )
    return numbers.astype(np.int64)


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
