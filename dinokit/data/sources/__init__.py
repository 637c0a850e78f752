"""Image sources: where images come from. A registry: a file here is a `data.name` in a recipe.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> ImageSource

Opening a source must be cheap, and it must pickle (loader processes receive a copy). A source with labels has
a field `split` in its Config, one of "all", "train", "test".
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dinokit.data.decode import ImageLike as ImageLike

READ, AMONG, DRAWN = 2_000, 20_000, 200  # images whose content is compared, with how many, if no file has it
_shared: dict[tuple[str, str], list[int]] = {}  # by two stamps: an evaluation repeats while a run trains


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
