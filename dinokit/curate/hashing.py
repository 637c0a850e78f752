"""Copies that are found without an embedding: the same pixels, and nearly the same.

The perceptual hash of an image is the sign of its 255 lowest frequencies: what survives another encoder and
another size, and changes with a crop. It is of the kind that Zauner 2010 calls pHash, made longer so that two
of a million images do not meet by chance.
"""

from collections.abc import Iterator
from functools import cache
from hashlib import blake2b

import numpy as np
from PIL import Image

from dinokit.data.sources import ImageLike, ImageSource

SIDE, KEPT = 64, 16  # pixels of the thumbnail; frequencies kept along each side
WORDS = KEPT * KEPT // 64
# Of an image: a digest of its pixels and their hash, how many there are, and whether it could be read.
RECORD = np.dtype([("digest", "<u8", 2), ("hash", "<u8", WORDS), ("pixels", "<u8"), ("valid", "?")])
FLAT = 2.0  # standard deviation in grey levels below which a thumbnail shows nothing that could be told apart
_PAIRS = 1 << 20  # compared at a time


def records(source: ImageSource, places: range) -> tuple[np.ndarray, list[str]]:
    """(m,) RECORD of the images at `places`, and a sentence for each that cannot be read."""
    done, wrong = np.zeros(len(places), RECORD), []
    for number, place in enumerate(places):
        try:
            picture, _ = source[place]
        except (OSError, ValueError) as error:
            wrong.append(f"{source.name(place)}: {error}")
            continue
        done[number] = record(picture)
    return done, wrong


def record(picture: ImageLike) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """The RECORD of one image. A flat one has a hash of zeros: it has no near copies."""
    array = np.asarray(picture)
    digest = blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    pixels = array.shape[0] * array.shape[1]
    return np.frombuffer(digest.digest(), "<u8"), perceptual(picture), pixels, True


def perceptual(picture: ImageLike) -> np.ndarray:
    """(4,) uint64: one bit a frequency, the mean's always 0."""
    thumb = _thumbnail(picture)
    if thumb.std() < FLAT:
        return np.zeros(WORDS, "<u8")
    waves = _cosines() @ thumb @ _cosines().T
    bits = waves > 0
    bits[0, 0] = False
    return np.packbits(bits.ravel()).view("<u8")


def near(hashes: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of different places whose hashes differ in `most` bits or fewer, each pair at least once.

    256 bits cut into most + 1 bands: two such hashes agree in at least one band, so only those that do are
    compared. Hashes of zeros have no pairs; equal hashes are chained to the first of them.

    Args:
        hashes: (n, 4) uint64.
        most: bits; below 0 there are no pairs.

    Yields:
        (m,) and (m,) int64 places.
    """
    if most < 0:
        return
    unique, first, where = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    some = hashes.any(axis=1)
    chained = np.flatnonzero(some & (first[where] != np.arange(len(hashes))))
    yield first[where[chained]], chained
    keep = unique.any(axis=1)
    unique, first = unique[keep], first[keep]
    for band in np.array_split(np.arange(64 * WORDS), most + 1):
        for a, b in _runs(_band(unique, band)):
            close = np.bitwise_count(unique[a] ^ unique[b]).sum(axis=1) <= most
            yield first[a[close]], first[b[close]]


def _band(hashes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """(n, bytes) uint8: the bits of each hash that lie in a band of consecutive ones."""
    first = bits[0] // 8
    part = np.ascontiguousarray(hashes).view(np.uint8)[:, first : bits[-1] // 8 + 1]
    return np.packbits(np.unpackbits(part, axis=1)[:, bits - 8 * first], axis=1)


def _runs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places with equal keys (n, bytes): at distance 1 in the sorted order, then 2, ..."""
    _, group = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(group, kind="stable")
    group = group[order]
    left = np.arange(len(order))
    for step in range(1, len(order)):
        left = left[left + step < len(order)]
        left = left[group[left] == group[left + step]]  # a run that ends here is longer at no greater step
        if not len(left):
            return
        for start in range(0, len(left), _PAIRS):
            part = left[start : start + _PAIRS]
            yield order[part], order[part + step]


def _thumbnail(picture: ImageLike) -> np.ndarray:
    """(64, 64) float64 grey levels."""
    if isinstance(picture, Image.Image):
        grey = picture.convert("L")
    else:
        array = picture.astype(np.float64)
        array = array * (255 / (np.iinfo(picture.dtype).max if picture.dtype.kind == "u" else 1))
        grey = Image.fromarray(array.mean(axis=2).astype(np.float32))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)


@cache
def _cosines() -> np.ndarray:
    """(16, 64): the lowest waves of the discrete cosine transform."""
    k, x = np.arange(KEPT)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE))
