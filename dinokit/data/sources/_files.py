"""Images that are files of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinokit.data.decode import decode
from dinokit.data.lines import Lines
from dinokit.data.names import Names
from dinokit.data.sources import ImageLike
from dinokit.data.sources._split import Rows
from dinokit.data.sources._stamp import stamp_of
from dinokit.data.sources._table import Column


@dataclass
class ImageFiles:
    """A source of image files, by their names from a folder on."""

    root: Path
    names: Names | Lines | Column  # of the files, from root on, or absolute
    rows: Rows  # which of them belong to the split
    labels: np.ndarray | None  # (len(names),); None without labels
    classes: Sequence[str]
    channels: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        path = self.file(index)
        label = -1 if self.labels is None else int(self.labels[self.rows[index]])
        return decode(path.read_bytes(), str(path), self.channels), label

    def stored(self, index: int) -> bytes:
        """The file of an image."""
        return self.file(index).read_bytes()

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """Where the file of an image is."""
        return self.root / self.names[self.rows[index]]

    def stamp(self) -> str:
        """Of the files of the split, their labels and channels."""
        files = (self.root / self.names[row] for row in self.rows)
        labels = None if self.labels is None else self.labels[self.rows]
        return stamp_of(files, (list(self.classes), self.channels), labels)
