"""Writing a feature store: its folder, compared with that of an earlier run, and the `.npy` files of a shard.

features/store.py has the format and its letters. A shard is written atomically, file by file.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from dinokit.features.store import RECORD, shard_path
from dinokit.runtime.files import TEMPORARY, atomic, write_text

# Keys of store.json that may change: paths and the version. `sizes` is compared where both have it.
UNCHECKED = ("weights", "data", "dinokit", "sizes")


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
    foreign = out.exists() and any(
        not p.match(TEMPORARY) and p.name not in known and not p.name.startswith(".lock")
        for p in out.iterdir()
    )
    if saved.exists():
        _compare(out, json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(about)))
    elif foreign:
        raise ValueError(f"out={out} is not empty and contains no features. Choose another folder.")
    with atomic(out / "names.txt") as temporary:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{name.replace(chr(10), ' ')}\n" for name in names)
        if saved.exists():
            _compare_names(out, temporary)
    if not saved.exists():
        write_text(saved, json.dumps(about, indent=1) + "\n")
    if clean:
        for temporary in out.rglob(TEMPORARY):
            temporary.unlink(missing_ok=True)


def _compare(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if all(old.get(key) == new.get(key) for key in {*old, *new}.difference(UNCHECKED)):
        if None not in (old.get("sizes"), new.get("sizes")) and old["sizes"] != new["sizes"]:
            raise ValueError(
                f"out={out} was made from other images of the same names: their files have other sizes now. "
                f"Choose another out."
            )
        return
    before, now = _shown(old), _shown(new)
    changed = [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    raise ValueError(
        f"out={out} contains features of other settings: {'; '.join(changed) or 'tokens of other shapes'}. "
        f"Choose another out, or give the old settings to resume."
    )


def _shown(about: dict[str, Any]) -> dict[str, str]:
    """The values of store.json by what they are called in an error, without what follows from others."""
    shown = {}
    for key, value in about.items():
        if key == "tokens" and isinstance(value, dict):
            shown["tokens"] = ",".join(value)
            shown["dtype"] = ",".join({str(e.get("dtype")): 0 for e in value.values() if isinstance(e, dict)})
        elif key == "transform" and isinstance(value, dict):
            shown |= {name: json.dumps(each) for name, each in value.items()}
        elif key == "fingerprint":
            shown["weights"] = f"{about.get('weights') or 'in memory'} ({str(value)[:8]})"
        elif key not in (*UNCHECKED, "width", "patch"):
            shown[key] = json.dumps(value)
    return shown


def _compare_names(out: Path, new: Path) -> None:
    with (out / "names.txt").open("rb") as a, new.open("rb") as b:
        pairs = enumerate(zip_longest(a, b, fillvalue=b"nothing"))
        number, lines = next(((number, pair) for number, pair in pairs if pair[0] != pair[1]), (0, ()))
    if lines:
        was, now = (line.decode(errors="replace").rstrip() for line in lines)
        raise ValueError(
            f"out={out} was made from other images: number {number} was '{was}', now '{now}'. Choose "
            f"another out."
        )


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
