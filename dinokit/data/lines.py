"""The lines of a text file by number, without holding them: a list of 100 million images opens in seconds."""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

EVERY = 64  # lines between two that are remembered; so many are read to find one
BLOCK = 2**24  # bytes looked through at a time
NEWLINE, HASH, SPACE = 10, 35, 32
MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines that are not empty and, unless told otherwise, do not begin with #, stripped, as strings.

    Kept are the places of every 64th in the file, an eighth of a byte a line; the file must stay as it was.
    """

    path: Path
    marks: np.ndarray  # (ceil(count / EVERY) + 1,) int64: where those lines begin, and where the file ends
    count: int
    comment: int = HASH  # the byte that a line which says nothing begins with

    @classmethod
    def of(cls, path: Path, comment: int = HASH) -> Self:
        """Look through a file once; `comment` -1: every line that is not empty says something."""
        marks, count = array("q"), 0
        for offset, body in _whole_lines(path):
            starts = _that_say_something(body, comment)
            marks.extend((offset + starts[-count % EVERY :: EVERY]).tolist())
            count += len(starts)
        marks.append(path.stat().st_size)
        return cls(path, np.array(marks, np.int64), count, comment)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        index = range(self.count)[index]  # counts from the end if negative, and raises IndexError
        start, end = self.marks[index // EVERY : index // EVERY + 2].tolist()
        with self.path.open("rb") as file:
            body = os.pread(file.fileno(), end - start, start)
        lines = [line for line in map(bytes.strip, body.split(b"\n")) if line and line[0] != self.comment]
        return lines[index % EVERY].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for _, body in _whole_lines(self.path):
            for line in map(bytes.strip, body.split(b"\n")):
                if line and line[0] != self.comment:
                    yield line.decode("utf-8", "surrogateescape")


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The file in blocks that end where a line ends, each with its place."""
    with path.open("rb") as file:
        offset = len(MARK) if file.read(len(MARK)) == MARK else 0
        file.seek(offset)
        rest = b""
        while block := file.read(BLOCK):
            rest += block
            end = rest.rfind(b"\n") + 1
            if end:
                yield offset, rest[:end]
                offset, rest = offset + end, rest[end:]
        if rest:
            yield offset, rest


def _that_say_something(body: bytes, comment: int) -> np.ndarray:
    """Where the lines begin that are not empty and no comment."""
    text = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(text == NEWLINE)
    starts = np.concatenate([[0], ends + 1])
    starts = starts[: len(ends)] if body.endswith(b"\n") else starts
    first = text[starts]
    says = (first > SPACE) & (first != comment)
    for i in np.flatnonzero((first <= SPACE) & (first != NEWLINE)):  # indented, or blank but not empty
        line = body[starts[i] : ends[i] if i < len(ends) else None].strip()
        says[i] = bool(line) and line[0] != comment
    return starts[says]
