"""Feature stores on disk: their format, and arrays over all shards that load only what is read.

    store = open_store(OUT)
    store["cls"][17]; store["cls"][1000:2000]; for shard in store["cls"].shards(): ...

Files of a store:

    OUT/store.json            what was computed, from which images, with which weights; written first
    OUT/names.txt             one name on each line, in the order of the images (a line break becomes a space)
    OUT/images/00000.npy      the images of a shard: valid, label, rows and columns of the patch grid (RECORD)
    OUT/cls/00000.npy ...     one folder for each token; shard k has images k * S to (k + 1) * S

or, with files=parquet, OUT/00000.parquet ... in place of the folders. A shard is complete when all its files
exist; each is written atomically.

    n  images of a shard     L  blocks extracted; no axis for a single block     D  width     R  registers
    N  patches of an image   T  patches of all images of a shard

cls, mean (n, [L,] D); registers (n, R, [L,] D); patch (n, N, [L,] D), or (T, [L,] D) if the grids differ.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.runtime.files import json_record, read_regular

FORMAT = "dinokit features 1"
TOKENS = ("cls", "mean", "patch", "registers")
RECORD = np.dtype([("valid", "?"), ("label", "<i4"), ("rows", "<i4"), ("columns", "<i4")])
MAX_IMAGES, SHARD_BYTES = 4096, 256 << 20  # of a shard; a killed run computes at most one shard again
OPEN = 64  # memory-mapped shards of an array that stay open


def shard_path(out: Path, token: str, number: int) -> Path:
    """The file of a shard."""
    return out / token / f"{number:05d}.npy"


def shard_range(number: int, size: int, images: int) -> range:
    """The images of a shard."""
    return range(number * size, min((number + 1) * size, images))


def shard_size(bytes_per_image: int) -> int:
    """Images in a shard: a power of two, at most 4,096 and at most 256 MiB in its largest file."""
    most = max(min(SHARD_BYTES // max(bytes_per_image, 1), MAX_IMAGES), 1)
    return 1 << (int(most).bit_length() - 1)


def shard_count(about: dict[str, Any]) -> int:
    """The number of shards of a store, from its store.json."""
    return -(-int(about["images"]) // int(about["shard"]))


def missing_shards(out: Path, about: dict[str, Any]) -> list[int]:
    """The numbers of the shards that are not complete."""
    numbers = range(shard_count(about))
    if about["files"] == "parquet":
        return [n for n in numbers if not (out / f"{n:05d}.parquet").is_file()]
    tokens = [*about["tokens"], "images"]
    return [n for n in numbers if not all(shard_path(out, token, n).is_file() for token in tokens)]


class Column:
    """One token of all images: (images, ...), row i is image i.

    Shards are memory-mapped when they are read; `flat` ones have any number of rows, as PatchColumn has them.
    """

    def __init__(
        self, out: Path, token: str, shape: tuple[int, ...], dtype: np.dtype, size: int, flat: bool = False
    ) -> None:
        self.shape, self.dtype, self.size, self._flat = shape, dtype, size, flat
        self._out, self._token = out, token
        self._shard = lru_cache(OPEN)(self._open)

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self, number: int) -> np.ndarray:
        path = shard_path(self._out, self._token, number)
        try:
            array: np.ndarray = np.load(path, mmap_mode="r")
        except Exception as error:  # a damaged header fails in many ways
            raise ValueError(f"{path} is damaged: {error}. Extract the features again.") from None
        rows = len(array) if self._flat and array.ndim else len(shard_range(number, self.size, len(self)))
        shape = (rows, *self.shape[1:])
        if array.shape != shape or array.dtype != self.dtype:
            raise ValueError(
                f"{path} is damaged: it has the shape {array.shape} and the type {array.dtype}, and by "
                f"store.json it has {shape} and {self.dtype}. Extract the features again."
            )
        return array

    def shards(self) -> Iterator[np.ndarray]:
        """The shards in order, each mapped read-only until the next one is asked for."""
        for number in range(-(-len(self) // self.size)):
            yield self._shard.__wrapped__(number)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """A row (a view of the file), or the rows of a slice, an index array or a mask (a copy)."""
        if isinstance(index, int | np.integer):
            place = _place(int(index), len(self))
            return self._shard(place // self.size)[place % self.size]
        indices = np.arange(len(self))[index]
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        for number in np.unique(indices // self.size):
            in_shard = indices // self.size == number
            rows[in_shard] = self._shard(int(number))[indices[in_shard] % self.size]
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, in memory."""
        return self[:].astype(dtype or self.dtype, copy=False)


class PatchColumn:
    """Patches of images whose grids differ: row i is (N_i, [L,] D)."""

    def __init__(self, flat: Column, images: Column) -> None:
        self.dtype, self._flat, self._images = flat.dtype, flat, images
        self._ends = lru_cache(OPEN)(lambda number: np.cumsum(patch_counts(images._shard(number))))

    def __len__(self) -> int:
        return len(self._images)

    def shards(self) -> Iterator[np.ndarray]:
        """The concatenated patches of each shard, (T, [L,] D)."""
        return self._flat.shards()

    def __getitem__(self, index: int) -> np.ndarray:
        """The patches of one image, row by row over its grid; an unreadable image has none."""
        number, place = divmod(_place(int(index), len(self)), self._images.size)
        ends = self._ends(number)
        return self._flat._shard(number)[ends[place - 1] if place else 0 : ends[place]]


def _place(index: int, images: int) -> int:
    """The number of an image; a negative index counts from the end."""
    if not -images <= index < images:
        raise IndexError(f"There is no image {index}: the store has {images}, numbered from 0.")
    return index % images


class Store:
    """A complete store.

    Attributes:
        about: the content of store.json.
        tokens: the tokens that it has.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.tokens = tuple(about["tokens"])
        size, images = about["shard"], about["images"]
        self._images = Column(out, "images", (images,), RECORD, size)
        self._columns: dict[str, Column | PatchColumn] = {}
        for token, entry in about["tokens"].items():
            differ = entry["shape"][1] is None
            shape = (images, *(entry["shape"][2:] if differ else entry["shape"][1:]))
            column = Column(out, token, shape, np.dtype(entry["dtype"]), size, differ)
            self._columns[token] = PatchColumn(column, self._images) if differ else column

    def __len__(self) -> int:
        return int(self.about["images"])

    def __getitem__(self, token: str) -> Any:
        """The array of a token.

        Raises:
            LookupError: if there is no such token.
        """
        if token not in self._columns:
            raise LookupError(f"{self.out} has no '{token}' tokens; it has: {', '.join(self.tokens)}.")
        return self._columns[token]

    def files(self, token: str) -> list[Path]:
        """The files of a token's shards, in order."""
        return [shard_path(self.out, token, number) for number in range(shard_count(self.about))]

    @property
    def valid(self) -> np.ndarray:
        """(images,) bool: which images could be read; the rows of the others are NaN."""
        return self._images[:]["valid"]

    @property
    def labels(self) -> np.ndarray:
        """(images,) int32, -1 without a label; `about["classes"]` names them."""
        return self._images[:]["label"]

    @property
    def grid(self) -> np.ndarray:
        """(images, 2) int32: rows and columns of each image's patch grid, 0 where it could not be read."""
        records = self._images[:]
        return np.stack([records["rows"], records["columns"]], axis=1)

    @property
    def names(self) -> list[str]:
        """The names of all images in the source; iter_names() keeps only one in memory. Raises as that."""
        return list(self.iter_names())

    def iter_names(self) -> Iterator[str]:
        """The names one by one.

        Raises:
            ValueError: after the last one, if there are not as many as images.
        """
        path, count = self.out / "names.txt", 0
        with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for count, line in enumerate(file, 1):  # noqa: B007 - read below
                yield line.removesuffix("\n")
        if count != len(self):
            raise ValueError(
                f"{path} is damaged: it has {count} names, and the store {len(self)} images. Extract the "
                f"features again."
            )


def open_store(out: str | Path) -> Store:
    """Open the features that `dinokit extract ... out=OUT` wrote.

    Raises:
        LookupError: if the folder has no store.json.
        ValueError: if the store is not complete, or in another format.
    """
    out = Path(out)
    if not (out / "store.json").is_file():
        raise LookupError(f"{out} contains no features: it has no store.json.")
    about = json_record(read_regular(out / "store.json").decode("utf-8", "replace"))
    if about is None:
        raise ValueError(f"{out / 'store.json'} is damaged: it is no object of JSON.")
    if about.get("format") != FORMAT:
        raise ValueError(f"{out} has the format '{about.get('format')}'; this version reads '{FORMAT}'.")
    _check(out / "store.json", about)
    if about["files"] != "npy":
        raise ValueError(
            f"{out} contains {about['files']} files: read them with pyarrow, pandas or datasets."
        )
    absent = shard_count(about) - len([*(out / "images").glob("*.npy")])
    # Counted first: a damaged number of images could be one of billions of shards.
    missing = absent if absent > 0 else len(missing_shards(out, about))
    if missing:
        raise ValueError(
            f"{out} is not complete: {missing} of {shard_count(about)} shards are missing. Run the "
            f"command that made it again: it resumes where it stopped."
        )
    return Store(out, about)


def _check(path: Path, about: dict[str, Any]) -> None:
    """Refuse a store.json whose values are not those that dinokit writes.

    Raises:
        ValueError: for the first one.
    """
    try:
        good = {"tokens": set(about["tokens"]) <= set(TOKENS)}  # they are names of folders
        good |= {key: type(about[key]) is int and about[key] > 0 for key in ("images", "shard")}
        good |= {
            "files": about["files"] in ("npy", "parquet"),
            "data": isinstance(about.get("data"), dict | None),
        }
        for token, entry in about["tokens"].items():
            shape, kind = entry["shape"], np.dtype(entry["dtype"]).kind
            numbers = [shape[0], *shape[2:], *(shape[1:2] if token != "patch" else ())]
            good[token] = kind == "f" and len(shape) > 1 and all(type(n) is int for n in numbers)
        wrong = [key for key in good if not good[key]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        raise ValueError(f"{path} is damaged, at: {', '.join(wrong)}. Extract the features again.")


def patch_counts(records: np.ndarray) -> np.ndarray:
    """The patches of each image, (n,) int64, from its RECORD."""
    return records["rows"].astype(np.int64) * records["columns"]
