"""Images in the rows of Parquet files, as Hugging Face data sets have them. Only this file reads Parquet.

The image column has the bytes of image files, or structs with a field `bytes`. The names of classes are read
from the metadata of the schema, as Hugging Face or dinokit write them.

Parquet can only be read by row groups, and training reads rows in random order. So the image column, which is
as small as its JPEGs, is loaded into memory up to `memory_gib`; forked loader processes share it, spawned
ones load their own. Above that limit only the last row group is stored: reading in order stays cheap, but a
random row costs reading its whole row group.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import ImageLike, decode
from dinokit.data.files import shards, stamp_of, wrong_kind
from dinokit.data.sources import choose_split, class_ids, select_classes, splits_of_files, whole_labels

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Coded = tuple[np.ndarray, Sequence[str]]  # (rows,) codes, -1 for none, and their words
PACKED = 100  # images are compressed already, so a file packs them hardly any further
_SLOW = 8 << 20  # bytes of a row group above which a random image is slow to read


@dataclass
class Config:
    path: str = "???"  # a .parquet, a folder of them, or a glob
    image: str = "image"  # column
    label: str = "label"  # column; may be missing, and "" ignores it
    split_column: str = "split"  # likewise
    split: Literal["all", "train", "test"] = "all"  # by that column, else by file names, else by a hash
    test_share: float = 0.1  # of images held out, if the data name no splits
    classes: tuple[str, ...] = ()  # only these classes, numbered in the data's order; empty: all
    memory_gib: float = 2.0  # of images, as stored, that a process may load
    channels: int = 3  # as backbone.channels
    max_pixels: int = 89_478_485  # of an image; one with more is unreadable
    orient: Literal["exif", "stored"] = "exif"  # turn images upright by EXIF, or leave them as stored


class Parquet:
    def __init__(self, cfg: Config) -> None:
        """Read the labels and splits and, if they fit into `memory_gib`, the images.

        Raises:
            ValueError: if there is no such file or column, pyarrow is missing, or the split has no image.
        """
        self._files = shards(cfg.path, ".parquet")
        self._image, self._channels = cfg.image, cfg.channels
        self.max_pixels, self.orient = cfg.max_pixels, cfg.orient
        columns = [read_columns(file, cfg.image, cfg.label, cfg.split_column) for file in self._files]
        rows = [count for file in columns for count in file.group_rows]
        self._groups = np.array(
            [(number, group) for number, file in enumerate(columns) for group in range(len(file.group_rows))]
        ).reshape(-1, 2)  # (groups, 2): the number of the file, the group in it
        self._starts = np.cumsum([0, *rows])  # (groups + 1,): the first row of each
        self._files_start = np.cumsum([0] + [sum(file.group_rows) for file in columns])  # (files + 1,)
        if not self._starts[-1]:
            raise ValueError(f"path='{cfg.path}': {len(columns)} file(s) without a row.")
        self.classes: Sequence[str]
        self.classes, self._labels = _labels(columns)
        named = _join([file.splits for file in columns])
        if named is None and cfg.split != "all":
            file_of_row = np.repeat(np.arange(len(columns)), np.diff(self._files_start))
            named = file_of_row, splits_of_files(self._files)
        self._rows = choose_split(
            cfg.split, cfg.test_share, self._names(), int(self._starts[-1]), named, cfg.path
        )
        if cfg.classes:
            self.classes, self._labels = select_classes(self.classes, self._labels, cfg.classes, cfg.path)
            self._rows = np.asarray(self._rows)[self._labels[self._rows] >= 0]
        size = sum(file.image_bytes for file in columns)
        self._in_memory = size <= cfg.memory_gib * 2**30
        self._images: dict[int, pa.ChunkedArray] = {}  # by group: all, or the last one read
        if self._in_memory:
            self._load_all()
        elif size > _SLOW * len(rows):
            warn(
                f"path='{cfg.path}' has {size / 2**30:.2f} GiB of images, above "
                f"memory_gib={cfg.memory_gib:g}, so reading a random image costs reading "
                f"{size / 2**20 / len(rows):.0f} MiB. Raise memory_gib, or store them as files or in .tar.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        data, name, label = self.stored(index), self.name(index), int(self._labels[self._rows[index]])
        return decode(data, name, self._channels, max_pixels=self.max_pixels, orient=self.orient), label

    def stored(self, index: int) -> bytes:
        """The content of the image file in the image column.

        Raises:
            ValueError: if there is none.
        """
        row = self._rows[index]
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        data = self._group(group)[int(row - self._starts[group])].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise ValueError(f"{self.name(index)} has no image.")
        return bytes(data)

    def name(self, index: int) -> str:
        """The file and the row in it, counted from 0."""
        row = self._rows[index]
        file = int(np.searchsorted(self._files_start, row, side="right")) - 1
        return f"{self._files[file]} row {row - self._files_start[file]}"

    def stamp(self) -> str:
        """A stamp of the files, the columns and the rows of the split."""
        settings = self._image, self._channels, list(self.classes), self.orient
        return stamp_of(self._files, settings, self._rows, self._labels)

    def _group(self, group: int) -> "pa.ChunkedArray":
        if group not in self._images:
            if self._in_memory:
                self._load_all()
            else:
                self._images = {group: self._read(group)}
        return self._images[group]

    def _load_all(self) -> None:
        self._images = {group: self._read(group) for group in range(len(self._groups))}

    def _read(self, group: int) -> "pa.ChunkedArray":
        file, inside = self._groups[group].tolist()
        return read_images(self._files[file], inside, self._image)

    def _names(self) -> Iterator[str]:
        for file, start, end in zip(self._files, self._files_start, self._files_start[1:], strict=False):
            for row in range(end - start):
                yield f"{file.name} row {row}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": {}}


build = Parquet


def column(cfg: Any, name: str) -> Parquet:
    """The files in one column, of the rows of the split; `cfg` has the keys of split and memory of Config."""
    keys = ("path", "split_column", "split", "test_share", "memory_gib")
    return Parquet(Config(image=name, label="", **{key: getattr(cfg, key) for key in keys}))


def _labels(columns: Sequence["Columns"]) -> tuple[Sequence[str], np.ndarray]:
    """The classes of all files; (rows,) labels."""
    if any(file.classes != columns[0].classes for file in columns):
        raise ValueError("The files do not name the same classes, so their labels cannot be read together.")
    coded = _join([file.labels for file in columns])
    if coded is None:
        return [], np.full(sum(sum(file.group_rows) for file in columns), -1, np.int32)
    if columns[0].classes is not None and coded[1] == columns[0].classes:
        return columns[0].classes, coded[0]
    return class_ids(*coded)


def _join(columns: Sequence[Coded | None]) -> Coded | None:
    """The codes of all files, over one list of words."""
    given = [column for column in columns if column is not None]
    if not given:
        return None
    if len(given) < len(columns):
        raise ValueError("Some of the files have a column for the label or the split, and others do not.")
    if all(list(words) == list(given[0][1]) for _, words in given):
        return np.concatenate([codes for codes, _ in given]), given[0][1]
    union = list(dict.fromkeys(word for _, words in given for word in words))
    number = {word: code for code, word in enumerate(union)}
    recoded = [np.array([*map(number.__getitem__, words), -1])[codes] for codes, words in given]
    return np.concatenate(recoded), union


@dataclass
class Columns:
    """The columns of one file, without its images."""

    group_rows: list[int]
    image_bytes: int  # of the whole image column in memory
    classes: list[str] | None  # class names in the metadata, by label
    labels: Coded | None
    splits: Coded | None


def read_columns(path: Path, image: str, label: str, split: str) -> Columns:
    """The columns of a file, without its images.

    Raises:
        ValueError: if it is not a Parquet file, pyarrow is missing, or a column is missing or of another
            type. The columns `label` and `split` may be missing.
    """
    file = _open(path)
    schema = file.schema_arrow
    _check(path, schema, image, label, split)
    names = [name for name in (label, split) if name in schema.names]
    _check_size(path, file, [_leaf(schema, image), *names])
    words = [c.path for c in file.schema if c.path in names and c.physical_type == "BYTE_ARRAY"]
    with _damage_named(path):
        table = _open(path, words).read(columns=names, use_threads=False)
    classes = _classes(schema, label) if label in names else None
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    leaf = _leaf(schema, image)
    leaves = [number for number, column in enumerate(file.schema) if column.path == leaf]
    return Columns(
        [group.num_rows for group in groups],
        sum(group.column(number).total_uncompressed_size for group in groups for number in leaves),
        classes,
        _label_codes(table.column(label), label, classes, path) if label in names else None,
        _word_codes(table.column(split)) if split in names else None,
    )


def _check_size(path: Path, file: "pq.ParquetFile", read: Sequence[str]) -> None:
    """Refuse a file whose columns `read` would fill the memory with what no images and labels are.

    Raises:
        ValueError: if it has more rows than bytes, or these columns are compressed by more than PACKED.
    """
    rows, size = file.metadata.num_rows, path.stat().st_size
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    chunks = [group.column(n) for group in groups for n in range(group.num_columns)]
    unpacked = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in read)
    )
    if rows > size or unpacked > PACKED * max(size, 1 << 20):
        raise ValueError(
            f"{path} has {size:,} bytes for {rows:,} rows, and {unpacked:,} bytes of images, labels and "
            f"splits: no images are so small. It is damaged, or made to fill the memory."
        )


def read_images(path: Path, group: int, image: str) -> "pa.ChunkedArray":
    """The images of one row group, as a chunked array of bytes or of structs with a field `bytes`.

    Raises:
        ValueError: if the row group is damaged.
    """
    file = _open(path)
    column = _leaf(file.schema_arrow, image)
    row_group = file.metadata.row_group(group)
    chunks = [row_group.column(number) for number in range(row_group.num_columns)]
    stored = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    # Larger dictionaries do not fit Arrow's offsets of 32 bits.
    file = _open(path, [column]) if stored < 2**30 else file
    with _damage_named(path):
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Name the file in pyarrow's errors, which do not."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read or is damaged: {reason}. Copy or download it again."
        ) from None


def read_metadata(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of the columns, and the value of the key `dinokit` in the schema's metadata.

    Raises:
        ValueError: if it is not a Parquet file, or pyarrow is missing.
    """
    schema = _open(path).schema_arrow
    metadata = json.loads((schema.metadata or {}).get(b"dinokit", b"{}"))
    return list(schema.names), metadata if isinstance(metadata, dict) else {}


def _arrow(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ValueError(
            "Parquet files are read by pyarrow, which is not installed: pip install '.[cpu]' in the clone, "
            "or '.[gpu]' on a machine with CUDA."
        ) from None


def _open(path: Path, words: list[str] | None = None) -> "pq.ParquetFile":
    """The file; a text or image that many rows of its columns `words` have is in memory once."""
    parquet = _arrow("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True, read_dictionary=words)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # missing or forbidden, which names the file
            raise
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
            f"Column '{image}' of {path} is of type {kind}; it must have the bytes of image files, or "
            f"structs with a field `bytes`."
        )


def _leaf(schema: "pa.Schema", image: str) -> str:
    kind = schema.field(image).type
    return f"{image}.bytes" if _arrow("pyarrow.types").is_struct(kind) else image


def _classes(schema: "pa.Schema", label: str) -> list[str] | None:
    """Class names by label, as Hugging Face or dinokit write them into the schema."""
    metadata = {key: json.loads(value) for key, value in (schema.metadata or {}).items() if key in _KEYS}
    feature = _at(metadata, b"huggingface", "info", "features", label)
    names = feature.get("names") if isinstance(feature, dict) else None
    names = names or _at(metadata, b"dinokit", "classes")
    return [str(name) for name in names] if isinstance(names, list) and names else None


_KEYS = (b"huggingface", b"dinokit")


def _at(values: object, *keys: str | bytes) -> object:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _label_codes(column: "pa.ChunkedArray", name: str, classes: list[str] | None, path: Path) -> Coded:
    types = _arrow("pyarrow.types")
    try:
        if types.is_floating(column.type):  # tools whose integers cannot be missing write 3.0 for label 3
            values = whole_labels(column.cast("float64").to_numpy(), name, str(path))
        elif types.is_integer(column.type):
            values = column.cast("int64").fill_null(-1).to_numpy()  # -1 is in no unsigned type
        else:
            return _word_codes(column)
    except _arrow("pyarrow").ArrowInvalid as error:
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
            f"(the first row is 0). Correct them, or the names in the metadata."
        )
    return values, classes


def _word_codes(column: "pa.ChunkedArray") -> Coded:
    if not _arrow("pyarrow.types").is_dictionary(column.type):
        column = column.cast("string").dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    words = array.dictionary.cast("string").dictionary_encode()  # without doubles
    of_entry = np.append(words.indices.fill_null(-1).to_numpy(zero_copy_only=False), -1)
    codes = of_entry[array.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    used = np.unique(codes[codes >= 0])  # a dictionary may have entries that no row has
    return np.where(codes >= 0, np.searchsorted(used, codes), -1), words.dictionary.take(used).to_pylist()
