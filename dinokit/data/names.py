"""Holds millions of strings, or the lines of a large text file, with little memory."""

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, Self

import numpy as np

CHUNK = 4096  # strings decoded at a time when iterating over all
EVERY = 64  # lines between two whose position is stored; at most so many are read to find one
BLOCK = 2**24  # bytes read at a time
NEWLINE, HASH, SPACE = 10, 35, 32
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which some editors write before UTF-8


class Strings(Protocol):
    """Strings by number: Names, Lines, or a column of a table."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True, eq=False)
class Names:
    """Strings by number, in one block of UTF-8: a million paths cost their bytes and 8 bytes more each.

    A list of Python strings would cost several times as much, and a forked loader process would copy it
    gradually, because reading a Python object writes to its reference count.
    """

    blob: np.ndarray  # (bytes,) uint8, all strings one after the other
    offsets: np.ndarray  # (n + 1,) int64, string i is blob[offsets[i]:offsets[i + 1]]

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Store the strings of an iterable, which may be a generator."""
        blob, offsets = bytearray(), array("q", [0])
        for name in names:
            blob += encode(name)
            offsets.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # counts from the end if negative, and raises IndexError
        text = self.blob[self.offsets[index] : self.offsets[index + 1]]
        return text.tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            offsets = self.offsets[start : start + CHUNK + 1]
            chunk = self.blob[offsets[0] : offsets[-1]].tobytes()
            for begin, end in pairwise((offsets - offsets[0]).tolist()):
                yield chunk[begin:end].decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """UTF-8; bytes of a file name that are not text stay as they are."""
    return name.encode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Lines:
    """The lines of a text file by number, stripped, without empty lines and without comments.

    Only the position of every 64th line is stored, an eighth of a byte per line, so a list of 100 million
    images opens in seconds. The file must not change.
    """

    path: Path
    positions: np.ndarray  # (ceil(count / EVERY) + 1,) int64: where those lines begin, then the file's end
    count: int
    comment: int = HASH  # the byte that a comment begins with

    @classmethod
    def of(cls, path: Path, comment: int = HASH) -> Self:
        """Read through a file once; with `comment` -1 there are no comments."""
        positions, count = array("q"), 0
        for offset, body in _line_blocks(path):
            starts = _line_starts(body, comment)
            positions.extend((offset + starts[-count % EVERY :: EVERY]).tolist())
            count += len(starts)
        positions.append(path.stat().st_size)
        return cls(path, np.array(positions, np.int64), count, comment)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        index = range(self.count)[index]  # counts from the end if negative, and raises IndexError
        start, end = self.positions[index // EVERY : index // EVERY + 2].tolist()
        with self.path.open("rb") as file:
            body = os.pread(file.fileno(), end - start, start)
        lines = [line for line in map(bytes.strip, body.split(b"\n")) if line and line[0] != self.comment]
        return lines[index % EVERY].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for _, body in _line_blocks(self.path):
            for line in map(bytes.strip, body.split(b"\n")):
                if line and line[0] != self.comment:
                    yield line.decode("utf-8", "surrogateescape")


def _line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """The file in blocks that end with a line, each with its position."""
    with path.open("rb") as file:
        offset = len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
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


def _line_starts(body: bytes, comment: int) -> np.ndarray:
    """Where the lines begin that are neither empty nor comments."""
    text = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(text == NEWLINE)
    starts = np.concatenate([[0], ends + 1])
    starts = starts[: len(ends)] if body.endswith(b"\n") else starts
    first = text[starts]
    selected = (first > SPACE) & (first != comment)
    for i in np.flatnonzero((first <= SPACE) & (first != NEWLINE)):  # indented, or spaces only
        line = body[starts[i] : ends[i] if i < len(ends) else None].strip()
        selected[i] = bool(line) and line[0] != comment
    return starts[selected]
