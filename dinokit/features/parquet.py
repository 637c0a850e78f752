"""One shard of features as a Parquet file, for those who read with pyarrow, pandas or datasets."""

from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dinokit.features.layout import RECORD
from dinokit.runtime.files import atomic


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


def unreadable_names(out: Path) -> Iterator[str]:
    """The names of the images in all shards of a folder that could not be read, in order."""
    parquet = _arrow("pyarrow.parquet")
    for path in sorted(out.glob("*.parquet")):
        table = parquet.read_table(path, columns=["name", "valid"])
        valid = table["valid"].to_numpy()
        yield from table["name"].take(np.flatnonzero(~valid)).to_pylist()


def _arrow(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ValueError(
            "format=parquet needs pyarrow, which is not installed: pip install -e '.[cpu]', or "
            "'.[gpu]' on a machine with CUDA; or take format=npy."
        ) from None
