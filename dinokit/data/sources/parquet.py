"""Images in the rows of Parquet files, as Hugging Face data sets have them.

The image column holds the bytes of image files, or a struct with a field `bytes`. The names of classes are
read from the metadata that Hugging Face, or we, write into the schema.

Parquet can be read by row groups only, and training asks for rows in random order. So the image column, which
is as small as its JPEGs, is held in memory up to `memory_gib`; forked loader processes share it, spawned ones
read their own. Above that limit only the row group used last is kept: reading in order stays cheap, but a row
drawn at random costs reading its whole row group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

import numpy as np

from dinokit.data.decode import decode
from dinokit.data.sources import ImageLike
from dinokit.data.sources._labels import class_ids, only
from dinokit.data.sources._parquet import Coded, Columns, read_columns, read_images
from dinokit.data.sources._paths import shards
from dinokit.data.sources._split import choose, sides_of_files
from dinokit.data.sources._stamp import stamp_of

if TYPE_CHECKING:
    import pyarrow as pa

_SLOW = 8 << 20  # bytes of a row group that are too many to read for one image


@dataclass
class Config:
    path: str = "???"  # a .parquet, a folder of them, or a glob
    image: str = "image"  # column
    label: str = "label"  # column; may be absent, and "" passes over it
    split_column: str = "split"  # likewise
    split: Literal["all", "train", "test"] = "all"  # by that column, else by file names, else by a hash
    test_share: float = 0.1  # of images held out, where the data do not say
    classes: tuple[str, ...] = ()  # take the images of these alone, numbered in the data's order; none: all
    memory_gib: float = 2.0  # of images, as stored, that a process may hold
    channels: int = 3  # as backbone.channels


class Parquet:
    def __init__(self, cfg: Config) -> None:
        """Read the labels and splits and, if they fit into `memory_gib`, the images.

        Raises:
            ValueError: if there is no such file or column, pyarrow is missing, or the split has no image.
        """
        self._files = shards(cfg.path, ".parquet")
        self._image, self._channels = cfg.image, cfg.channels
        parts = [read_columns(file, cfg.image, cfg.label, cfg.split_column) for file in self._files]
        rows = [count for part in parts for count in part.group_rows]
        self._groups = np.array(
            [(number, group) for number, part in enumerate(parts) for group in range(len(part.group_rows))]
        ).reshape(-1, 2)  # (groups, 2): the number of the file, the group in it
        self._starts = np.cumsum([0, *rows])  # (groups + 1,): the first row of each
        self._files_start = np.cumsum([0] + [sum(part.group_rows) for part in parts])  # (files + 1,)
        if not self._starts[-1]:
            raise ValueError(f"path='{cfg.path}': {len(parts)} file(s) without a row.")
        self.classes: Sequence[str]
        self.classes, self._labels = _labels(parts)
        said = _joined([part.splits for part in parts])
        if said is None and cfg.split != "all":
            said = np.repeat(np.arange(len(parts)), np.diff(self._files_start)), sides_of_files(self._files)
        self._rows = choose(cfg.split, cfg.test_share, self._names(), int(self._starts[-1]), said, cfg.path)
        if cfg.classes:
            self.classes, self._labels = only(self.classes, self._labels, cfg.classes, cfg.path)
            self._rows = np.asarray(self._rows)[self._labels[self._rows] >= 0]
        size = sum(part.image_bytes for part in parts)
        self._hold = size <= cfg.memory_gib * 2**30
        self._images: dict[int, pa.ChunkedArray] = {}  # by group: all of them, or the one used last
        if self._hold:
            self._fill()
        elif size > _SLOW * len(rows):
            warn(
                f"path='{cfg.path}' has {size / 2**30:.2f} GiB of images, above "
                f"memory_gib={cfg.memory_gib:g}, so one drawn at random costs reading "
                f"{size / 2**20 / len(rows):.0f} MiB. Raise memory_gib, or store them as files or in .tar.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        data = self.stored(index)
        return decode(data, self.name(index), self._channels), int(self._labels[self._rows[index]])

    def stored(self, index: int) -> bytes:
        """The file in the image column.

        Raises:
            ValueError: if there is none.
        """
        row = self._rows[index]
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        data = self._group(group)[int(row - self._starts[group])].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise ValueError(f"{self.name(index)} holds no image.")
        return bytes(data)

    def name(self, index: int) -> str:
        """The file and the row in it, counted from 0."""
        row = self._rows[index]
        file = int(np.searchsorted(self._files_start, row, side="right")) - 1
        return f"{self._files[file]} row {row - self._files_start[file]}"

    def stamp(self) -> str:
        """Of the files, the columns read and the rows of the split."""
        settings = self._image, self._channels, list(self.classes)
        return stamp_of(self._files, settings, self._rows, self._labels)

    def _group(self, group: int) -> "pa.ChunkedArray":
        if group not in self._images:
            if self._hold:
                self._fill()
            else:
                self._images = {group: self._read(group)}
        return self._images[group]

    def _fill(self) -> None:
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


def _labels(parts: Sequence[Columns]) -> tuple[Sequence[str], np.ndarray]:
    """The classes of all files; (rows,) labels."""
    if any(part.classes != parts[0].classes for part in parts):
        raise ValueError("The files do not name the same classes, so their labels cannot be read together.")
    said = _joined([part.labels for part in parts])
    if said is None:
        return [], np.full(sum(sum(part.group_rows) for part in parts), -1, np.int32)
    if parts[0].classes is not None and said[1] == parts[0].classes:
        return parts[0].classes, said[0]
    return class_ids(*said)


def _joined(parts: Sequence[Coded | None]) -> Coded | None:
    """Codes of all files, over one list of words."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    if len(given) < len(parts):
        raise ValueError("Some of the files have a column for the label or the split, and others have not.")
    if all(list(words) == list(given[0][1]) for _, words in given):
        return np.concatenate([codes for codes, _ in given]), given[0][1]
    both = list(dict.fromkeys(word for _, words in given for word in words))
    number = {word: place for place, word in enumerate(both)}
    moved = [np.array([*map(number.__getitem__, words), -1])[codes] for codes, words in given]
    return np.concatenate(moved), both
