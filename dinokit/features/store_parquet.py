"""The Parquet form of a store of features, for pandas, polars and datasets: one file a shard."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.features.store import RECORD, patch_counts
from dinokit.features.store_write import Append
from dinokit.runtime.files import atomic


@contextmanager
def parquet_shard(out: Path, number: int, about: str) -> Iterator[Append]:
    """OUT/00000.parquet: name, label, valid, rows, columns, and for each token a flat list of numbers.

    The metadata `dinokit` is the content of store.json, which has the shapes of the lists. Yields
    append(rows of each token, records, names), which writes one row group.
    """
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    writer: Any = None

    def append(tokens: dict[str, np.ndarray], records: np.ndarray, names: list[str]) -> None:
        nonlocal writer
        columns = {"name": arrow.array(names, arrow.string())}
        columns |= {key: arrow.array(records[key]) for key in RECORD.names or ()}
        columns |= {token: _lists(arrow, array, records, token) for token, array in tokens.items()}
        table = arrow.table(columns).replace_schema_metadata({"dinokit": about})
        if writer is None:
            writer = parquet.ParquetWriter(temporary, table.schema, use_dictionary=["name"])
        writer.write_table(table)

    with atomic(out / f"{number:05d}.parquet") as temporary:
        try:
            yield append
        finally:
            if writer is not None:
                writer.close()


def _lists(arrow: Any, array: np.ndarray, records: np.ndarray, token: str) -> Any:
    flat, numbers = arrow.array(array.reshape(-1)), int(np.prod(array.shape[1:]))
    if len(array) == len(records) and token != "patch":
        return arrow.FixedSizeListArray.from_arrays(flat, numbers)
    sizes = np.full(len(records), array.size // max(len(records), 1))
    if len(array) != len(records):  # concatenated patches
        sizes = patch_counts(records) * numbers
    return arrow.LargeListArray.from_arrays(arrow.array(np.cumsum([0, *sizes])), flat)


def unreadable_names(out: Path) -> Iterator[str]:
    """Names of the unreadable images in all Parquet shards of a folder, in order."""
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
            "format=parquet needs pyarrow, which is not installed: pip install '.[cpu]' in the clone, or "
            "'.[gpu]' on a machine with CUDA; or take format=npy."
        ) from None
