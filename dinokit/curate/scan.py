"""Looks at a sample of the images of a source: formats, sizes, colours, and what would harm a training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from dinokit.curate.dedup import Status
from dinokit.curate.hashing import RECORD, find_duplicates, hash_image
from dinokit.curate.settings import Hash
from dinokit.data.decode import suffix
from dinokit.data.sources import ImageLike, ImageSource

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
    modes: Counter[str] = field(
        default_factory=Counter
    )  # channels and bits as stored: "3 x 8 bit", or "palette"
    turned: int = 0  # with an EXIF orientation other than upright
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of readable images
    mean: list[float] = field(default_factory=list)  # of each channel, in [0, 1]
    std: list[float] = field(default_factory=list)
    grey: int = 0  # three channels that are alike
    unreadable: list[str] = field(default_factory=list)  # error messages, which begin with the name
    exact: list[tuple[str, str]] = field(default_factory=list)  # a duplicate, and the image that it repeats
    near: list[tuple[str, str]] = field(default_factory=list)

    def histogram(self) -> list[tuple[str, int]]:
        """Images by the shorter side: the range in pixels, and how many."""
        sides = [min(size) for size in self.sizes]
        counts, _ = np.histogram(sides, [*EDGES, np.inf])
        names = [f"{low} to {high - 1}" for low, high in pairwise(EDGES)]
        return [
            pair for pair in zip([*names, f"{EDGES[-1]} or more"], counts.tolist(), strict=True) if pair[1]
        ]


def scan(source: ImageSource, sample: int = SAMPLE) -> Scan:
    """Read `sample` images of a source, evenly spread over it."""
    result, rows = Scan(len(source)), np.zeros(min(len(source), sample), RECORD)
    names, moments = [], []
    for row, index in enumerate(np.linspace(0, len(source) - 1, len(rows)).astype(int).tolist()):
        names.append(source.name(index))
        result.read += 1
        try:
            _read_header(source, index, result)
            picture = source[index][0]
            rows[row] = hash_image(picture)
        except (OSError, ValueError) as error:
            result.unreadable.append(str(error))
            continue
        pixels = _pixels(picture)
        result.sizes.append(_size(picture))
        result.grey += pixels.shape[2] == 3 and bool(
            np.abs(pixels - pixels.mean(2, keepdims=True)).mean() < GREY
        )
        moments.append([pixels.mean((0, 1)), np.square(pixels).mean((0, 1))])
    if moments:
        mean, square = np.mean(moments, axis=0)
        result.mean = mean.round(3).tolist()
        result.std = np.sqrt(np.maximum(square - np.square(mean), 0)).round(3).tolist()
    status, keeper, _ = find_duplicates(rows, len(rows), Hash().bits, largest=False)
    for kind, pairs in ((Status.EXACT, result.exact), (Status.NEAR, result.near)):
        pairs.extend((names[i], names[keeper[i]]) for i in np.flatnonzero(status == kind).tolist())
    return result


def _read_header(source: Any, index: int, result: Scan) -> None:
    """Count format, channels, bits and orientation as they are stored; sources without files have none."""
    if not hasattr(source, "stored"):
        return
    try:
        with Image.open(BytesIO(source.stored(index))) as image:
            deep = image.mode.startswith("I") or "16" in str(image.tile[0].args if image.tile else "")
            bits = 32 if image.mode == "F" else 16 if deep else 8
            result.turned += image.getexif().get(ORIENTATION, 1) in range(2, 9)
            result.formats[str(image.format)] += 1
            stored = "palette" if image.mode == "P" else f"{len(image.getbands())} x {bits} bit"
            result.modes[stored] += 1
    except Exception:  # an array, a DICOM file, or damaged: reading the image says which
        result.formats[suffix(source.name(index)) or "unknown"] += 1


def _size(picture: ImageLike) -> tuple[int, int]:
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def _pixels(picture: ImageLike) -> np.ndarray:
    """(h, w, C) float64 in [0, 1]: every so many pixels of the image."""
    array = np.atleast_3d(np.asarray(picture))
    array = array[:: max(array.shape[0] // 64, 1), :: max(array.shape[1] // 64, 1)]
    return array / (np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1.0)


def findings(result: Scan) -> list[Finding]:
    """What is wrong with the images, or worth knowing before a training, with what to do."""
    found, n = [], result.read

    def add(name: str, count: int, text: str, problem: bool = False, examples: Sequence[str] = ()) -> None:
        if count:
            listed = f" For example: {'; '.join(examples[:NAMED])}." if examples else ""
            found.append(Finding(name, problem, f"{count} of {n} images {text}{listed}"))

    text = "cannot be read. Repair or remove them; run.max_unreadable is what a training allows."
    add("unreadable", len(result.unreadable), text, True, result.unreadable)
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
    text = f"have a side below {SMALL} pixels, so their crops are enlarged: lower crops.globals.size."
    add("small", sum(min(size) < SMALL for size in result.sizes), text)
    if len(result.modes) > 1:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in result.modes.most_common())
        text = f"Images differ in channels or bits: {kinds}. All are converted to backbone.channels."
        found.append(Finding("mixed", False, text))
    if result.grey and result.grey == len(result.sizes):
        text = "All images are grey. Set backbone.channels=1, or crops.saturation=0 crops.hue=0 crops.gray=0."
        found.append(Finding("grey", False, text))
    return found
