"""The columns of a .csv: paths by number, and the words of labels and splits.

pyarrow looks through the whole table at once, and of the paths only the places of lines are kept. What is no
table of one row a line to it (values that hold line ends, rows of other lengths), and everything where it is
not installed, goes through Python's own reader row by row; errors are always that one's.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from dinokit.data.lines import BLOCK, Lines
from dinokit.data.names import Names
from dinokit.data.sources._labels import Categorical

_PATH = ("path", "file", "image", "filename")


@dataclass(frozen=True, eq=False)
class Column:
    """One value of each row, stripped; row i is line i + 1, below the header."""

    lines: Lines
    place: int

    def __len__(self) -> int:
        return len(self.lines) - 1

    def __getitem__(self, index: int) -> str:
        row = range(len(self))[index]  # counts from the end if negative, and raises IndexError
        return next(csv.reader([self.lines[row + 1]]))[self.place].strip()

    def __iter__(self) -> Iterator[str]:
        lines = iter(self.lines)
        next(lines)
        return (row[self.place].strip() for row in csv.reader(lines))


def read_table(path: Path) -> tuple[Column | Names, Categorical, Categorical]:
    """Paths, labels and splits; without a column for them, these have no word.

    Raises:
        ValueError: if there is no column of paths, or a row is not like the header or has no path.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = [name.strip().lower() for name in next(csv.reader(file), [])]
    if not set(_PATH) & set(header):
        raise ValueError(
            f"{path} has no column {' or '.join(_PATH)}; there is: {', '.join(header) or 'nothing'}."
        )
    place = next(header.index(name) for name in _PATH if name in header)
    labels, splits, noted = _fresh(header)
    lines = Lines.of(path, comment=-1)
    if _at_once(path, header, place, noted) == len(lines) - 1:
        return Column(lines, place), labels, splits
    labels, splits, noted = _fresh(header)
    return Names.of(_row_by_row(path, header, place, noted)), labels, splits


Noted = Sequence[tuple[int, Categorical]]  # columns, and where their words go


def _fresh(header: Sequence[str]) -> tuple[Categorical, Categorical, Noted]:
    """Labels and splits without a word, and their columns."""
    labels, splits = Categorical(), Categorical()
    both = ("label", labels), ("split", splits)
    return labels, splits, [(header.index(key), words) for key, words in both if key in header]


def _at_once(path: Path, header: Sequence[str], place: int, noted: Noted) -> int:
    """Note the words of all rows. Returns how many there are; -1: this is not for pyarrow."""
    try:
        pa, reader, compute = map(import_module, ("pyarrow", "pyarrow.csv", "pyarrow.compute"))
    except ModuleNotFoundError:
        return -1
    names = [str(i) for i in range(len(header))]
    kinds = {names[place]: pa.binary()} | {names[i]: pa.dictionary(pa.int32(), pa.binary()) for i, _ in noted}
    rows = 0
    try:
        batches = reader.open_csv(
            path,
            reader.ReadOptions(column_names=names, skip_rows=1, block_size=BLOCK),
            convert_options=reader.ConvertOptions(column_types=kinds, include_columns=list(kinds)),
        )
        for batch in batches:
            paths = compute.ascii_trim_whitespace(batch.column(names[place]).view(pa.string()))
            if compute.any(compute.equal(paths, "")).as_py():
                return -1
            for i, words in noted:
                said = batch.column(names[i])
                different = [
                    x.decode("utf-8", "surrogateescape").strip() for x in said.dictionary.to_pylist()
                ]
                words.extend(said.indices.to_numpy(), different)
            rows += len(batch)
    except pa.ArrowInvalid:
        return -1
    return rows


def _row_by_row(path: Path, header: Sequence[str], place: int, noted: Noted) -> Iterator[str]:
    """The paths; the words of other columns are noted as they go by."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header) or not row[place].strip():
                raise ValueError(f"{path}, line {rows.line_num}: {row} is not a row of {', '.join(header)}.")
            for column, words in noted:
                words.add(row[column].strip())
            yield row[place].strip()
