"""Image files named in a list.

A `.txt` file has one path per line; empty lines and lines that begin with # are ignored. A `.csv` file has a
header with a column `path` (or `file`, `image`, `filename`), and optional columns `label` and `split`. Paths
that are not absolute are relative to the folder of the list.

pyarrow reads a `.csv` file in blocks, and only positions of lines are stored for the paths. Python's own
reader reads it row by row if pyarrow is not installed, if values contain line ends, or if rows have different
lengths; errors always come from that reader.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Literal

from dinokit.data.files import BLOCK, ImageFiles, Lines, Names, Strings, existing, wrong_kind
from dinokit.data.sources import Categorical, ImageSource, choose_split, class_ids

_CHECKED = 100  # files that must not all be missing when the list is opened
_PATH = ("path", "file", "image", "filename")


@dataclass
class Config:
    path: str = "???"
    split: Literal["all", "train", "test"] = "all"  # by the column `split`, if any, else by a hash
    test_share: float = 0.1  # of images held out, if the list has no splits
    channels: int = 3  # as backbone.channels
    max_pixels: int = 89_478_485  # of an image; one with more is unreadable
    orient: Literal["exif", "stored"] = "exif"  # turn images upright by EXIF, or leave them as stored


def build(cfg: Config) -> ImageSource:
    """Read the list.

    Raises:
        ValueError: if there is no such list, it is empty or not of this form, the first hundred files are all
            missing, or the split has no image.
    """
    path = existing(cfg.path)
    if path.is_dir() or path.suffix.lower() not in (".txt", ".csv"):
        raise wrong_kind(path, "a list of image files (.txt or .csv)")
    names: Strings
    if path.suffix.lower() == ".txt":
        names, labels, splits = Lines.of(path), Categorical(), Categorical()
    else:
        names, labels, splits = read_table(path)
    _check_first_files(path, names)
    classes, ids = class_ids(labels.codes, labels.words)
    named = (splits.codes, splits.words) if splits.words else None
    rows = choose_split(cfg.split, cfg.test_share, names, len(names), named, str(path))
    return ImageFiles(
        path.parent,
        names,
        rows,
        ids if labels.words else None,
        classes,
        cfg.channels,
        cfg.max_pixels,
        cfg.orient,
    )


def _check_first_files(path: Path, names: Strings) -> None:
    if not len(names):
        raise ValueError(f"{path} names no image file.")
    first = [path.parent / name for name in islice(names, _CHECKED)]
    if not any(file.is_file() for file in first):
        raise ValueError(
            f"None of the first {len(first)} files that {path} names exists. '{names[0]}' was looked for at "
            f"{first[0].absolute()}: paths that are not absolute are relative to the folder of the list."
        )


@dataclass(frozen=True, eq=False)
class Column:
    """One column of a .csv, stripped; row i is line i + 1, below the header."""

    lines: Lines
    column: int

    def __len__(self) -> int:
        return len(self.lines) - 1

    def __getitem__(self, index: int) -> str:
        row = range(len(self))[index]  # counts from the end if negative, and raises IndexError
        return next(csv.reader([self.lines[row + 1]]))[self.column].strip()

    def __iter__(self) -> Iterator[str]:
        lines = iter(self.lines)
        next(lines)
        return (row[self.column].strip() for row in csv.reader(lines))


def read_table(path: Path) -> tuple[Column | Names, Categorical, Categorical]:
    """Paths, labels and splits; the last two are empty without a column for them.

    Raises:
        ValueError: if there is no column of paths, or a row does not fit the header or has no path.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = [name.strip().lower() for name in next(csv.reader(file), [])]
    if not set(_PATH) & set(header):
        raise ValueError(
            f"{path} has no column {' or '.join(_PATH)}; it has: {', '.join(header) or 'nothing'}."
        )
    path_column = next(header.index(name) for name in _PATH if name in header)
    labels, splits, columns = _empty_columns(header)
    lines = Lines.of(path, comment=-1)
    if _read_blocks(path, header, path_column, columns) == len(lines) - 1:
        return Column(lines, path_column), labels, splits
    labels, splits, columns = _empty_columns(header)
    return Names.of(_row_by_row(path, header, path_column, columns)), labels, splits


Columns = Sequence[tuple[int, Categorical]]  # column numbers, and the columns to fill


def _empty_columns(header: Sequence[str]) -> tuple[Categorical, Categorical, Columns]:
    """Empty columns of labels and splits, and those that the table has."""
    labels, splits = Categorical(), Categorical()
    both = ("label", labels), ("split", splits)
    return labels, splits, [(header.index(key), words) for key, words in both if key in header]


def _read_blocks(path: Path, header: Sequence[str], path_column: int, columns: Columns) -> int:
    """Fill the columns with pyarrow. Returns the number of rows; -1 if pyarrow cannot read the table."""
    try:
        pa, reader, compute = map(import_module, ("pyarrow", "pyarrow.csv", "pyarrow.compute"))
    except ModuleNotFoundError:
        return -1
    names = [str(i) for i in range(len(header))]
    kinds = {names[path_column]: pa.binary()} | {
        names[i]: pa.dictionary(pa.int32(), pa.binary()) for i, _ in columns
    }
    rows = 0
    try:
        batches = reader.open_csv(
            path,
            reader.ReadOptions(column_names=names, skip_rows=1, block_size=BLOCK),
            convert_options=reader.ConvertOptions(column_types=kinds, include_columns=list(kinds)),
        )
        for batch in batches:
            paths = compute.ascii_trim_whitespace(batch.column(names[path_column]).view(pa.string()))
            if compute.any(compute.equal(paths, "")).as_py():
                return -1
            for i, words in columns:
                codes = batch.column(names[i])
                different = [
                    x.decode("utf-8", "surrogateescape").strip() for x in codes.dictionary.to_pylist()
                ]
                words.extend(codes.indices.to_numpy(), different)
            rows += len(batch)
    except pa.ArrowInvalid:
        return -1
    return rows


def _row_by_row(path: Path, header: Sequence[str], path_column: int, columns: Columns) -> Iterator[str]:
    """The paths; fills the columns on the way."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header) or not row[path_column].strip():
                raise ValueError(f"{path}, line {rows.line_num}: {row} is not a row of {', '.join(header)}.")
            for number, words in columns:
                words.add(row[number].strip())
            yield row[path_column].strip()
