"""Writers of one shard of features: a folder of `.npy` files, or one Parquet file. Whole, or not there."""

import errno
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from dinokit.features.layout import RECORD, shard_path
from dinokit.features.npy import GrowingArray
from dinokit.files import atomic


class Shard(Protocol):
    """Takes the images of a shard, some at a time and in order."""

    def append(self, arrays: dict[str, np.ndarray], records: np.ndarray, names: list[str]) -> None: ...


class NpyShard:
    """Files of a shard as layout.py says; use it in a `with` block.

    Args:
        out: the store's folder.
        number: of the shard.
        rows: shape and type of a row of each token.
    """

    def __init__(self, out: Path, number: int, rows: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.out, self.number, self.rows = out, number, {**rows, "images": ((), RECORD)}

    def __enter__(self) -> "NpyShard":
        self.stack = ExitStack()
        self.files: dict[str, GrowingArray] = {}
        for token, (row, dtype) in self.rows.items():
            part = self.stack.enter_context(atomic(shard_path(self.out, token, self.number)))
            self.files[token] = self.stack.enter_context(GrowingArray(part, row, dtype))
        return self

    def append(self, arrays: dict[str, np.ndarray], records: np.ndarray, names: list[str]) -> None:
        """Rows of each token, and the RECORD of each image."""
        for token, array in {**arrays, "images": records}.items():
            self.files[token].append(array)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)


class ParquetShard:
    """OUT/00000.parquet: name, label, valid, rows, columns, and a list of numbers a token, flattened.

    The shape that a list had is in the metadata `dinokit`, which is what store.json says.
    """

    def __init__(self, out: Path, number: int, about: str) -> None:
        self.path, self.about = out / f"{number:05d}.parquet", about
        self.arrow = _arrow("pyarrow")
        self.parquet = _arrow("pyarrow.parquet")

    def __enter__(self) -> "ParquetShard":
        self.stack = ExitStack()
        self.part = self.stack.enter_context(atomic(self.path))
        self.writer: Any = None
        return self

    def append(self, arrays: dict[str, np.ndarray], records: np.ndarray, names: list[str]) -> None:
        """One row group."""
        columns = {"name": self.arrow.array(names, self.arrow.string())}
        columns |= {key: self.arrow.array(records[key]) for key in RECORD.names or ()}
        columns |= {token: self._lists(array, records, token) for token, array in arrays.items()}
        table = self.arrow.table(columns).replace_schema_metadata({"dinokit": self.about})
        if self.writer is None:
            self.writer = self.parquet.ParquetWriter(self.part, table.schema, use_dictionary=["name"])
        self.writer.write_table(table)

    def _lists(self, array: np.ndarray, records: np.ndarray, token: str) -> Any:
        flat = self.arrow.array(array.reshape(-1))
        if len(array) == len(records) and token != "patch":
            return self.arrow.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))
        sizes = np.full(len(records), array.size // max(len(records), 1))
        if len(array) != len(records):  # patches end to end
            sizes = records["rows"].astype(np.int64) * records["columns"] * int(np.prod(array.shape[1:]))
        return self.arrow.LargeListArray.from_arrays(self.arrow.array(np.cumsum([0, *sizes])), flat)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            self.stack.__exit__(kind, error, trace)


def in_words(error: OSError, out: Path, done: int, shards: int) -> OSError:
    """The error of a write, with what is kept and how to go on."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = "there is no room left" if full else str(error)
    return OSError(
        f"A shard of features could not be written to {out}: {why}. {done} of {shards} shards are done and "
        f"stay. {'Make room' if full else 'Mend that'}, and the same command goes on from there."
    )


def _arrow(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ValueError(
            "format=parquet needs pyarrow, which is not installed: pip install 'dinokit[cpu]', or "
            "'dinokit[gpu]' on a machine with CUDA; or take format=npy."
        ) from None
