"""Looks at a sample of the images of a source: formats, sizes, colours, and what would harm a training.

`dinokit doctor`, the choice of a recipe, the start of a training and reports all look by this file.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

from dinokit.data.decode import UNREADABLE, ImageLike, open_image, suffix
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import size_of

SAMPLE = 500  # images that are read
GREY = 0.01  # mean difference of the channels from their mean, as a share of white
SMALL = 64  # pixels of the shorter side
NAMED = 5  # images that a finding names
ORIENTATION = 274  # the EXIF tag
EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # of the histogram of shorter sides


@dataclass
class Finding:
    """Something that a user should know; a problem makes `dinokit doctor` fail, other findings do not."""

    name: str
    problem: bool
    text: str


@dataclass
class Scan:
    """What a sample of images is like; counts are of images."""

    images: int  # of the source
    read: int = 0  # of the sample, readable or not
    formats: Counter[str] = field(default_factory=Counter)
    # Channels and bits as stored: "3 x 8 bit", or "palette".
    modes: Counter[str] = field(default_factory=Counter)
    turned: int = 0  # with an EXIF orientation other than upright
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of readable images
    grey: int = 0  # three channels that are alike
    unreadable: list[str] = field(default_factory=list)  # error messages, which begin with the name
    not_finite: list[str] = field(default_factory=list)  # names of images with NaN or infinite pixels
    exact: list[tuple[str, str]] = field(default_factory=list)  # a duplicate, and the image that it repeats
    near: list[tuple[str, str]] = field(default_factory=list)  # for those who search near duplicates
    _first: dict[bytes, str] = field(default_factory=dict)  # names of the first images, by digest of pixels
    _moments: list[np.ndarray] = field(default_factory=list)  # of each image: (2, C) means of x and x squared

    def look(self, source: ImageSource, index: int) -> tuple[ImageLike, int] | None:
        """Read an image, and count what it is like. Returns it with its label; None if it is unreadable."""
        self.read, name = self.read + 1, source.name(index)
        try:
            _read_header(source, index, self)
            picture, label = source[index]
            if picture is None:  # of a source of another package
                raise ValueError("it is None, not an image")
        except UNREADABLE as error:
            self.unreadable.append(str(error) if name in str(error) else f"{name}: {error}")
            return None
        pixels = _pixels(picture)
        first = self._first.setdefault(pixel_digest(picture), name)
        if first != name:
            self.exact.append((name, first))
        self.sizes.append(size_of(picture))
        if not _finite(np.asarray(picture)):
            self.not_finite.append(name)
            return picture, label
        self.grey += pixels.shape[2] == 3 and bool(
            np.abs(pixels - pixels.mean(2, keepdims=True)).mean() < GREY
        )
        self._moments.append(np.stack([pixels.mean((0, 1)), np.square(pixels).mean((0, 1))]))
        return picture, label

    @property
    def mean(self) -> list[float]:
        """The mean of each channel, in [0, 1]."""
        return np.mean(self._moments, axis=0)[0].round(3).tolist() if self._moments else []

    @property
    def std(self) -> list[float]:
        """The deviation of each channel, in [0, 1]."""
        if not self._moments:
            return []
        mean, square = np.mean(self._moments, axis=0)
        return np.sqrt(np.maximum(square - np.square(mean), 0)).round(3).tolist()

    def facts(self) -> dict[str, Any]:
        """All of it for a report in JSON."""
        shown = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        return {**shown, "mean": self.mean, "std": self.std, "histogram": self.histogram()}

    def histogram(self) -> list[tuple[str, int]]:
        """Images by the shorter side: the range in pixels, and how many."""
        sides = [min(size) for size in self.sizes]
        counts, _ = np.histogram(sides, [*EDGES, np.inf])
        names = [f"{low} to {high - 1}" for low, high in pairwise(EDGES)]
        return [
            pair for pair in zip([*names, f"{EDGES[-1]} or more"], counts.tolist(), strict=True) if pair[1]
        ]


def scan(
    source: ImageSource,
    sample: int = SAMPLE,
    seconds: float = inf,
    visit: Callable[[str, ImageLike], object] | None = None,
) -> Scan:
    """Read `sample` images of a source, evenly spread over it.

    Args:
        source: the images.
        sample: images that are read, at most.
        seconds: after which no further image is read; they then come in a random order.
        visit: called with the name and the pixels of each readable image.
    """
    result, begin = Scan(len(source)), time.monotonic()
    order = np.linspace(0, len(source) - 1, min(len(source), sample)).astype(int)
    if seconds < inf:
        order = np.random.default_rng(0).permutation(order)
    for index in order.tolist():
        found = result.look(source, index)
        if found is not None and visit is not None:
            visit(source.name(index), found[0])
        if time.monotonic() - begin > seconds:
            break
    return result


def pixel_digest(picture: ImageLike) -> bytes:
    """16 bytes that two images share if their pixels are the same."""
    array = np.asarray(picture)
    digest = blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _read_header(source: Any, index: int, result: Scan) -> None:
    """Count format, channels, bits and orientation as they are stored; sources without files have none."""
    if not hasattr(source, "stored"):
        return
    try:
        with open_image(source.stored(index)) as image:
            deep = image.mode.startswith("I") or "16" in str(image.tile[0].args if image.tile else "")
            bits = 32 if image.mode == "F" else 16 if deep else 8
            result.turned += image.getexif().get(ORIENTATION, 1) in range(2, 9)
            result.formats[str(image.format)] += 1
            stored = "palette" if image.mode == "P" else f"{len(image.getbands())} x {bits} bit"
            result.modes[stored] += 1
    except Exception:  # an array, a DICOM file, or damaged: reading the image says which
        result.formats[suffix(source.name(index)) or "unknown"] += 1


def _finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _pixels(picture: ImageLike) -> np.ndarray:
    """(h, w, C) float64 in [0, 1]: every so many pixels of the image."""
    array = np.atleast_3d(np.asarray(picture))
    array = array[:: max(array.shape[0] // 64, 1), :: max(array.shape[1] // 64, 1)]
    return array / (np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1.0)


def findings(result: Scan, small: int = SMALL) -> list[Finding]:
    """What is wrong with the images, or worth knowing before a training, with what to do.

    Args:
        result: of the scan.
        small: pixels of the shorter side below which an image is small.
    """
    found, n = [], result.read

    def add(name: str, count: int, text: str, problem: bool = False, examples: Sequence[str] = ()) -> None:
        if count:
            listed = f" For example: {'; '.join(examples[:NAMED])}." if examples else ""
            found.append(Finding(name, problem, f"{count} of {n} images {text}{listed}"))

    text = "cannot be read. Repair or remove them; run.max_unreadable is what a training allows."
    add("unreadable", len(result.unreadable), text, True, result.unreadable)
    text = "have pixels that are not finite: a step with one of them is skipped. Repair or remove them."
    add("not finite", len(result.not_finite), text, True, result.not_finite)
    for name, pairs, text in (
        ("exact duplicates", result.exact, "have the pixels of another one"),
        ("near duplicates", result.near, "are nearly the same picture as another one"),
    ):
        examples = [f"{a} and {b}" for a, b in pairs]
        add(name, len(pairs), f"{text}. dinokit curate removes duplicates.", examples=examples)
    text = (
        "are stored turned; they are used upright, by their EXIF orientation. data.orient=stored leaves them."
    )
    add("orientation", result.turned, text)
    text = f"have a side below {small} pixels, so their crops are enlarged: lower crops.globals.size."
    add("small", sum(min(size) < small for size in result.sizes), text)
    if len(result.modes) > 1:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in result.modes.most_common())
        text = f"Images differ in channels or bits: {kinds}. All are converted to backbone.channels."
        found.append(Finding("mixed", False, text))
    if result.grey and result.grey == len(result.sizes):
        text = "All images are grey. Set backbone.channels=1, or crops.saturation=0 crops.hue=0 crops.gray=0."
        found.append(Finding("grey", False, text))
    return found
