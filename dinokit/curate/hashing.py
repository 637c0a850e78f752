"""Finds duplicates without embeddings, the stage `hash`: the same pixels, or nearly the same picture.

The perceptual hash of an image is the signs of the 255 lowest frequencies of its cosine transform. Another
encoder or another size changes few of them, a crop changes many. It is the pHash of Zauner 2010 with more
bits, so that two of a million different images do not have a similar hash by chance.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinokit.curate.dedup import Components, Status, representatives
from dinokit.curate.image_sets import ImageSet
from dinokit.curate.index import save, shard_files
from dinokit.curate.settings import Config, Hash, Share
from dinokit.data.scan import Scan, pixel_digest, scan
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.data.transforms import size_of
from dinokit.runtime.files import write_text

SHARD = 4096  # images whose hashes are written to one file
SIDE, FREQUENCIES = 64, 16  # pixels of the thumbnail, and frequencies used, along each side
WORDS = FREQUENCIES * FREQUENCIES // 64
# Of an image: a digest of its pixels, its hash, its number of pixels, and whether it can be read.
RECORD = np.dtype([("digest", "<u8", 2), ("hash", "<u8", WORDS), ("pixels", "<u8"), ("valid", "?")])
FLAT = 2.0  # standard deviation in grey levels; the hash of a flatter thumbnail would be noise
_PAIRS = 1 << 20  # compared at a time


def hash_pool(
    cfg: Config, pool: ImageSet, against: list[ImageSet], folder: Path, share: Share
) -> dict[str, Any]:
    """Stage `hash`: hash all images, and find duplicates in the pool and of evaluation images.

    Writes status.npz: status (n,); of (n,) the image that each image duplicates, or itself; pixels (n,), 0 if
    unknown; seen (s, 3): image of the pool, number of the evaluation set, image of it.
    """
    sets = [pool, *against]
    if cfg.hash.bits < 0 or pool.source is None:
        n = len(pool)
        nothing = {"of": np.arange(n), "pixels": np.zeros(n, np.uint64), "seen": np.zeros((0, 3), np.int64)}
        save(folder / "status.npz", status=np.zeros(n, np.uint8), **nothing)
        return {"images": n, "computed": 0}
    for image_set in sets:
        if image_set.source is not None:
            _write_records(image_set, folder / image_set.label, cfg.hash.processes, share)
    if share.of > 1:
        return {}
    tables = [_read_records(image_set, folder / image_set.label) for image_set in sets]
    table, n = np.concatenate(tables), len(pool)
    status, of, pairs = find_duplicates(table, n, cfg.hash.bits, cfg.dedup.keep == "largest")
    starts = np.cumsum([0, *map(len, tables)])
    number = np.searchsorted(starts, pairs[:, 1], side="right") - 1
    seen = np.stack([pairs[:, 0], number - 1, pairs[:, 1] - starts[number]], axis=1)
    save(folder / "status.npz", status=status, of=of, pixels=table["pixels"][:n], seen=seen)
    counts = {kind.name.lower(): int((status == kind).sum()) for kind in list(Status)[1:4]}
    note = f"The names of unreadable images are in {folder / pool.label}/*.unreadable.txt."
    return {
        "images": n,
        "computed": sum(len(image_set) for image_set in sets if image_set.source is not None),
        **counts,
        "showing_evaluation_images": len(np.unique(seen[:, 0])),
        **({"note": note} if counts["unreadable"] else {}),
    }


def find_duplicates(
    table: np.ndarray, n: int, bits: int, largest: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find exact and near duplicates by their hashes.

    Args:
        table: RECORDs of the pool's n images, followed by those of evaluation images.
        n: images of the pool.
        bits: that may differ between near duplicates.
        largest: the image with most pixels represents a group, not the first.

    Returns:
        (n,) Status; (n,) the image that represents its group; (s, 2) rows of `table`: an image of the pool
        and an evaluation image that are duplicates.
    """
    status = np.where(table["valid"][:n], Status.CLEAN, Status.UNREADABLE).astype(np.uint8)
    valid = np.flatnonzero(table["valid"])
    _, first, where = np.unique(table["digest"][valid], axis=0, return_index=True, return_inverse=True)
    same = valid[first[where]]  # the first image with these pixels
    edges = [np.stack([same, valid])]
    # Exact duplicates have one hash, so only the first of them is compared. Sorted, so that of equal hashes
    # the first is an image of the pool: images joined only through an evaluation image would not be a group.
    distinct = np.sort(valid[first])
    edges += [distinct[np.stack(pair)] for pair in near_pairs(table["hash"][distinct], bits)]
    exact_of = np.arange(len(table))
    exact_of[valid] = same
    components, across_sets = Components(n), []
    for a, b in edges:
        inside = (a < n) & (b < n)
        components.add_edges(a[inside], b[inside])
        across = (a < n) != (b < n)
        across_sets.append(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1)[across])
    exact_of, label = exact_of[:n], components.labels()
    keeper = representatives(label, table["pixels"][:n] if largest else None, status == Status.CLEAN)
    duplicate = (keeper != np.arange(n)) & (status == Status.CLEAN)
    exact = (exact_of == exact_of[keeper]) | (exact_of != np.arange(n))
    status[duplicate] = np.where(exact, Status.EXACT, Status.NEAR)[duplicate]
    return status, keeper, np.unique(np.concatenate(across_sets), axis=0)


def scan_with_near_duplicates(source: ImageSource, sample: int) -> Scan:
    """scan(), with the near duplicates of images within the sample."""
    names, records = [], []

    def visit(name: str, picture: ImageLike) -> None:
        names.append(name)
        records.append(hash_image(picture))

    result, table = scan(source, sample, visit=visit), np.zeros(len(names), RECORD)
    for row, record in enumerate(records):
        table[row] = record
    status, keeper, _ = find_duplicates(table, len(table), Hash().bits, largest=False)
    near = np.flatnonzero(status == Status.NEAR).tolist()
    result.near = [(names[i], names[keeper[i]]) for i in near]
    return result


def near_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of hashes that differ in `bits` bits or fewer, each pair at least once.

    The 256 bits are cut into bits + 1 bands. Two such hashes are equal in at least one band, so only hashes
    with an equal band are compared. Zero hashes have no pairs; equal hashes are paired with the first one.

    Args:
        hashes: (n, 4) uint64.
        bits: below 0 there are no pairs.

    Yields:
        (m,) and (m,) int64 rows of `hashes`.
    """
    if bits < 0:
        return
    unique, first, where = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    nonzero = hashes.any(axis=1)
    repeated = np.flatnonzero(nonzero & (first[where] != np.arange(len(hashes))))
    yield first[where[repeated]], repeated
    nonzero = unique.any(axis=1)
    unique, first = unique[nonzero], first[nonzero]
    for band in np.array_split(np.arange(64 * WORDS), bits + 1):
        for a, b in _equal_pairs(_band(unique, band)):
            close = np.bitwise_count(unique[a] ^ unique[b]).sum(axis=1) <= bits
            yield first[a[close]], first[b[close]]


def _band(hashes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """(n, bytes) uint8: the bits of each hash at these consecutive positions."""
    first = bits[0] // 8
    some = np.ascontiguousarray(hashes).view(np.uint8)[:, first : bits[-1] // 8 + 1]
    return np.packbits(np.unpackbits(some, axis=1)[:, bits - 8 * first], axis=1)


def _equal_pairs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows with equal keys (n, bytes): at distance 1 in sorted order, then 2, ..."""
    _, group = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(group, kind="stable")
    group = group[order]
    left = np.arange(len(order))
    for step in range(1, len(order)):
        left = left[left + step < len(order)]
        left = left[group[left] == group[left + step]]  # a group that ends here ends at every larger step
        if not len(left):
            return
        for start in range(0, len(left), _PAIRS):
            some = left[start : start + _PAIRS]
            yield order[some], order[some + step]


def _write_records(image_set: ImageSet, folder: Path, processes: int, share: Share) -> None:
    """Write the missing files of RECORDs, and of the errors of images that cannot be read."""
    files = [file for file in shard_files(folder, len(image_set), SHARD, share=share) if not file[0].exists()]
    write = partial(_write_shard, image_set.source, len(image_set))
    if processes == 1 or len(files) < 2:
        for file in files:
            write(file)
        return
    with ProcessPoolExecutor(min(processes, len(files)), get_context("spawn")) as executor:
        # The source is pickled once for each of these chunks.
        list(executor.map(write, files, chunksize=-(-len(files) // (4 * processes))))


def _write_shard(source: Any, n: int, file: tuple[Path, int]) -> None:
    path, start = file
    records, errors = hash_images(source, range(start, min(start + SHARD, n)))
    write_text(path.with_suffix(".unreadable.txt"), "".join(f"{line}\n" for line in errors))
    save(path, records)


def _read_records(image_set: ImageSet, folder: Path) -> np.ndarray:
    if image_set.source is None:
        return np.zeros(len(image_set), RECORD)  # not valid: never compared
    return np.concatenate([np.load(path) for path, _ in shard_files(folder, len(image_set), SHARD)])


def hash_images(source: ImageSource, images: range) -> tuple[np.ndarray, list[str]]:
    """(m,) RECORDs of images, and an error message for each that cannot be read."""
    records, errors = np.zeros(len(images), RECORD), []
    for row, image in enumerate(images):
        try:
            picture, _ = source[image]
        except (OSError, ValueError) as error:
            errors.append(f"{source.name(image)}: {error}")
            continue
        records[row] = hash_image(picture)
    return records, errors


def hash_image(picture: ImageLike) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """The RECORD of one image."""
    width, height = size_of(picture)
    return np.frombuffer(pixel_digest(picture), "<u8"), perceptual_hash(picture), width * height, True


def perceptual_hash(picture: ImageLike) -> np.ndarray:
    """(4,) uint64: one bit a frequency, 0 for the mean. A flat image has a zero hash: no near duplicates."""
    grey = _grey_thumbnail(picture)
    if grey.std() < FLAT:
        return np.zeros(WORDS, "<u8")
    bits = _cosines() @ grey @ _cosines().T > 0
    bits[0, 0] = False
    return np.packbits(bits.ravel()).view("<u8")


def _grey_thumbnail(picture: ImageLike) -> np.ndarray:
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
    """(16, 64): the lowest frequencies of the discrete cosine transform."""
    k, x = np.arange(FREQUENCIES)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE))
