"""Features on disk, read: arrays over all shards, which load only what is asked for (see layout.py).

store = open_store(OUT)
store["cls"][17]; store["cls"][1000:2000]; for part in store["cls"].shards(): ...
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.features.layout import FORMAT, RECORD, shard_path

OPEN = 64  # mapped shards an array keeps open


class Column:
    """One token of all images: (images, ...), row i is image i; shards are mapped when they are touched."""

    def __init__(self, out: Path, token: str, shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
        self.shape, self.dtype, self.size = shape, dtype, size
        self._shard = lru_cache(OPEN)(lambda number: np.load(shard_path(out, token, number), mmap_mode="r"))

    def __len__(self) -> int:
        return self.shape[0]

    def shards(self) -> Iterator[np.ndarray]:
        """The shards in order, each mapped read-only and let go of when the next one comes."""
        for number in range(-(-len(self) // self.size)):
            yield self._shard.__wrapped__(number)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """A row (a view into the file), or the rows of a slice, of places, or of a mask (a copy)."""
        if isinstance(index, int | np.integer):
            place = range(len(self))[int(index)]
            return self._shard(place // self.size)[place % self.size]
        places = np.arange(len(self))[index]
        done = np.empty((len(places), *self.shape[1:]), self.dtype)
        for number in np.unique(places // self.size):
            here = places // self.size == number
            done[here] = self._shard(int(number))[places[here] % self.size]
        return done

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, in memory."""
        return self[:].astype(dtype or self.dtype, copy=False)


class PatchColumn:
    """Patches of images whose grids differ: row i is (N_i, [L,] D)."""

    def __init__(self, flat: Column, images: Column) -> None:
        self.dtype, self._flat, self._images = flat.dtype, flat, images
        self._ends = lru_cache(OPEN)(lambda number: np.cumsum(_patches(images._shard(number))))

    def __len__(self) -> int:
        return len(self._images)

    def shards(self) -> Iterator[np.ndarray]:
        """The patches of each shard end to end, (T, [L,] D)."""
        return self._flat.shards()

    def __getitem__(self, index: int) -> np.ndarray:
        """The patches of one image, row by row over its grid; none if it was unreadable."""
        number, place = divmod(range(len(self))[int(index)], self._images.size)
        ends = self._ends(number)
        return self._flat._shard(number)[ends[place - 1] if place else 0 : ends[place]]


class Store:
    """A finished extraction.

    Attributes:
        about: what store.json says.
        names: the images' names, in order.
        tokens: those that there are.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.tokens = tuple(about["tokens"])
        size, images = about["shard"], about["images"]
        self._images = Column(out, "images", (images,), RECORD, size)
        self._columns: dict[str, Column | PatchColumn] = {}
        for token, said in about["tokens"].items():
            differ = said["shape"][1] is None
            shape = (images, *(said["shape"][2:] if differ else said["shape"][1:]))
            column = Column(out, token, shape, np.dtype(said["dtype"]), size)
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
        shards = -(-len(self) // self.about["shard"])
        return [shard_path(self.out, token, number) for number in range(shards)]

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
        """Of all images, as the source calls them; iter_names() holds one at a time."""
        return list(self.iter_names())

    def iter_names(self) -> Iterator[str]:
        """The names one by one."""
        with (self.out / "names.txt").open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n")


def open_store(out: str | Path) -> Store:
    """The features that `dinokit extract ... out=OUT` wrote.

    Raises:
        LookupError: if there are none.
        ValueError: if they are not complete, or not in this format.
    """
    out = Path(out)
    if not (out / "store.json").is_file():
        raise LookupError(f"{out} holds no features: there is no store.json in it.")
    about = json.loads((out / "store.json").read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{out} is of the format '{about.get('format')}'; this reads '{FORMAT}'.")
    if about["files"] != "npy":
        raise ValueError(f"{out} holds {about['files']} files: read them with pyarrow, pandas or datasets.")
    lost = missing(out, about)
    if lost:
        count = -(-about["images"] // about["shard"])
        raise ValueError(
            f"{out} is not complete: {len(lost)} of {count} shards are missing. The command that made it "
            f"goes on where it stopped."
        )
    return Store(out, about)


def missing(out: Path, about: dict[str, Any]) -> list[int]:
    """The numbers of the shards that are not done."""
    numbers = range(-(-about["images"] // about["shard"]))
    if about["files"] == "parquet":
        return [n for n in numbers if not (out / f"{n:05d}.parquet").is_file()]
    tokens = [*about["tokens"], "images"]
    return [n for n in numbers if not all(shard_path(out, token, n).is_file() for token in tokens)]


def _patches(records: np.ndarray) -> np.ndarray:
    return records["rows"].astype(np.int64) * records["columns"]
