"""Writes the files of a feature store: the folder, and shards as .npy or Parquet.

A shard writer is a context manager: its files appear, complete, when the block ends without an error.
"""

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from filecmp import cmp
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from dinokit.features.store import RECORD, shard_path
from dinokit.runtime.files import TEMPORARY, atomic, write_text

UNCHECKED = ("weights", "data", "dinokit")  # keys of store.json that may change: paths and the version


def prepare_folder(out: Path, about: dict[str, Any], names: Iterable[str], clean: bool) -> None:
    """Write store.json and names.txt, or compare them with those of an earlier run.

    Args:
        out: the store's folder.
        about: the content of store.json.
        names: of the images, in order.
        clean: whether to delete temporary files of a killed process; not while other processes write.

    Raises:
        ValueError: if the folder has other files, or features of other settings or other images.
    """
    saved = out / "store.json"
    # Check this first: another process that starts now writes store.json soon, before any shard.
    known = {"names.txt", saved.name}
    foreign = out.exists() and any(not p.match(TEMPORARY) and p.name not in known for p in out.iterdir())
    if saved.exists():
        _compare(out, json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(about)))
    elif foreign:
        raise ValueError(f"out={out} is not empty and contains no features. Choose another folder.")
    with atomic(out / "names.txt") as temporary:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{name.replace(chr(10), ' ')}\n" for name in names)
        if saved.exists() and not cmp(temporary, out / "names.txt", shallow=False):
            raise ValueError(
                f"out={out} {_first_difference(out / 'names.txt', temporary)} Choose another out."
            )
    if not saved.exists():
        write_text(saved, json.dumps(about, indent=1) + "\n")
    if clean:
        for temporary in out.rglob(TEMPORARY):
            temporary.unlink(missing_ok=True)


def _compare(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in UNCHECKED
    ]
    if changed:
        raise ValueError(
            f"out={out} contains features of other settings: {'; '.join(changed)}. Choose another out, or "
            f"give the old settings to resume."
        )


def _first_difference(old: Path, new: Path) -> str:
    with old.open("rb") as a, new.open("rb") as b:
        for number, (was, now) in enumerate(zip_longest(a, b)):
            if was != now:
                words = [
                    "absent" if line is None else f"'{line.decode(errors='replace').rstrip()}'"
                    for line in (was, now)
                ]
                return f"was made from other images: number {number} was {words[0]}, now {words[1]}."
    return "has other names."


AppendRows = Callable[[np.ndarray], None]
Append = Callable[[dict[str, np.ndarray], np.ndarray, list[str]], None]


@contextmanager
def growing_array(path: Path, row: tuple[int, ...], dtype: np.dtype) -> Iterator[AppendRows]:
    """A `.npy` file of rows of one shape, which is complete when the block ends; yields append(rows).

    Rows are written, not memory-mapped: on a full disk a write raises OSError, but a map kills the process.
    """
    count = 0

    def write_header() -> None:
        file.seek(0)
        about = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *row)}
        npy.write_array_header_1_0(file, about)

    def append(rows: np.ndarray) -> None:
        nonlocal count
        assert rows.shape[1:] == row, (rows.shape, row)
        assert rows.dtype == dtype, (rows.dtype, dtype)
        file.write(np.ascontiguousarray(rows).data)
        count += len(rows)

    with path.open("w+b") as file:
        write_header()
        yield append
        write_header()  # numpy reserves space in it for a larger number of rows


@contextmanager
def npy_shard(out: Path, number: int, rows: dict[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[Append]:
    """The `.npy` files of one shard; yields append(rows of each token, records, names).

    Args:
        out: the store's folder.
        number: of the shard.
        rows: shape and dtype of a row of each token.
    """
    with ExitStack() as stack:
        arrays = {}
        for token, (row, dtype) in {**rows, "images": ((), RECORD)}.items():
            temporary = stack.enter_context(atomic(shard_path(out, token, number)))
            arrays[token] = stack.enter_context(growing_array(temporary, row, dtype))

        def append(tokens: dict[str, np.ndarray], records: np.ndarray, names: list[str]) -> None:
            for token, array in {**tokens, "images": records}.items():
                arrays[token](array)

        yield append


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
        sizes = records["rows"].astype(np.int64) * records["columns"] * numbers
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
            "format=parquet needs pyarrow, which is not installed: pip install -e '.[cpu]', or "
            "'.[gpu]' on a machine with CUDA; or take format=npy."
        ) from None


def write_error(error: OSError, out: Path, complete: int, shards: int) -> OSError:
    """An error of writing, with what is saved and how to continue."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = "the disk is full" if full else str(error)
    return OSError(
        f"A shard of features could not be written to {out}: {why}. {complete} of {shards} shards are "
        f"complete and stay. {'Free some space' if full else 'Correct that'}; the same command then resumes."
    )
