"""One Parquet file: its columns and its row groups. The only file that knows Parquet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.sources._paths import wrong_kind

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Coded = tuple[np.ndarray, Sequence[str]]  # (rows,) codes, -1 for none, and the words that they number


@dataclass
class Columns:
    """What is known of a file without reading its images."""

    group_rows: list[int]
    image_bytes: int  # of the whole image column, as it will lie in memory
    classes: list[str] | None  # names that the file keeps apart, by label
    labels: Coded | None
    splits: Coded | None


def read_columns(path: Path, image: str, label: str, split: str) -> Columns:
    """Everything but the images.

    Raises:
        ValueError: if it is no Parquet file, pyarrow is missing, or a column is missing or of a wrong type.
            Columns by the names `label` and `split` may be missing.
    """
    file = _open(path)
    schema = file.schema_arrow
    _check(path, schema, image, label, split)
    wanted = [name for name in (label, split) if name in schema.names]
    table = file.read(columns=wanted, use_threads=False)
    classes = _classes(schema, label) if label in wanted else None
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    leaf = _leaf(schema, image)
    parts = [number for number, part in enumerate(file.schema) if part.path == leaf]
    return Columns(
        [group.num_rows for group in groups],
        sum(group.column(part).total_uncompressed_size for group in groups for part in parts),
        classes,
        _label_codes(table.column(label), classes, path) if label in wanted else None,
        _word_codes(table.column(split)) if split in wanted else None,
    )


def read_images(path: Path, group: int, image: str) -> "pa.ChunkedArray":
    """The images of one row group, as a chunked array of bytes or of structs with a field `bytes`."""
    file = _open(path)
    return file.read_row_group(group, columns=[_leaf(file.schema_arrow, image)], use_threads=False).column(0)


def read_about(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of the columns, and what the schema's metadata holds under the key `dinokit`.

    Raises:
        ValueError: if it is no Parquet file, or pyarrow is missing.
    """
    schema = _open(path).schema_arrow
    about = json.loads((schema.metadata or {}).get(b"dinokit", b"{}"))
    return list(schema.names), about if isinstance(about, dict) else {}


def _arrow(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ValueError(
            "Parquet files are read by pyarrow, which is not installed: pip install -e '.[cpu]', or "
            "'.[gpu]' on a machine with CUDA."
        ) from None


def _open(path: Path) -> "pq.ParquetFile":
    parquet = _arrow("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except ValueError as error:
        if path.suffix.lower() != ".parquet":
            raise wrong_kind(path, "a .parquet file") from None
        raise ValueError(f"{path} is damaged or no Parquet file: {error}") from None


def _check(path: Path, schema: "pa.Schema", image: str, label: str, split: str) -> None:
    needed = {"image": image}
    needed |= {
        key: name
        for key, name in (("label", label), ("split_column", split))
        if name != key.partition("_")[0]
    }
    for key, name in needed.items():
        if name and name not in schema.names:
            raise ValueError(
                f"{path} has no column '{name}' for {key}.{suggest(name, schema.names)} It has: "
                f"{', '.join(schema.names)}. Set {key}=COLUMN."
            )
    kind = schema.field(image).type
    if "binary" not in str(kind) or "list" in str(kind):
        raise ValueError(
            f"Column '{image}' of {path} is of type {kind}; it should hold the bytes of image files, or a "
            f"struct with a field `bytes`."
        )


def _leaf(schema: "pa.Schema", image: str) -> str:
    kind = schema.field(image).type
    return f"{image}.bytes" if _arrow("pyarrow.types").is_struct(kind) else image


def _classes(schema: "pa.Schema", label: str) -> list[str] | None:
    """Class names by label, as Hugging Face writes them into the schema, or as we do."""
    kept = {key: json.loads(value) for key, value in (schema.metadata or {}).items() if key in _KEYS}
    feature = _at(kept, b"huggingface", "info", "features", label)
    names = feature.get("names") if isinstance(feature, dict) else None
    names = names or _at(kept, b"dinokit", "classes")
    return [str(name) for name in names] if isinstance(names, list) and names else None


_KEYS = (b"huggingface", b"dinokit")


def _at(values: object, *keys: str | bytes) -> object:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _label_codes(column: "pa.ChunkedArray", classes: list[str] | None, path: Path) -> Coded:
    types = _arrow("pyarrow.types")
    # A tool without whole numbers that may be absent writes 3.0 for label 3; without names, 3.0 is a name.
    if not types.is_integer(column.type) and not (classes and types.is_floating(column.type)):
        return _word_codes(column)
    try:
        values = column.cast("int64").fill_null(-1).to_numpy()  # -1 is in no unsigned type
    except ValueError as error:
        raise ValueError(
            f"{path} has labels that no int64 holds: {error}. Write -1 or null for no label."
        ) from None
    if classes is None:
        numbers, codes = np.unique(values, return_inverse=True)
        return codes, [str(number) for number in numbers]
    outside = np.flatnonzero((values < -1) | (values >= len(classes)))
    if len(outside):
        first, last = outside[0], len(classes) - 1
        raise ValueError(
            f"{path} has {len(outside)} label(s) that are none of the classes it names, 0 ({classes[0]}) to "
            f"{last} ({classes[last]}), nor -1 for no label. The first is {values[first]}, in row {first} "
            f"(the first row is 0). Correct them, or the names in the schema's metadata."
        )
    return values, classes


def _word_codes(column: "pa.ChunkedArray") -> Coded:
    words = column.cast("string").combine_chunks().dictionary_encode()
    return words.indices.fill_null(-1).to_numpy(zero_copy_only=False), words.dictionary.to_pylist()
