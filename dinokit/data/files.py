"""Files on disk: their names in little memory, image files as a source, paths, and stamps of their state."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from dinokit.config import registry
from dinokit.config.values import SOURCE_OF_SUFFIX
from dinokit.data import dicom
from dinokit.data.decode import HEIC, MAX_PIXELS, ImageLike, Orient, decode
from dinokit.runtime.files import read_regular
from dinokit.runtime.log import info

Rows = range | np.ndarray  # numbers of images

CHUNK = 4096  # strings decoded at a time when iterating over all
EVERY = 64  # lines between two whose position is stored; at most so many are read to find one
BLOCK = 2**24  # bytes read at a time
NEWLINE, HASH, SPACE = 10, 35, 32
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which some editors write before UTF-8
_reported: set[str] = set()  # lines about files that were left out


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


@dataclass
class ImageFiles:
    """A source of image files, by their names below a folder."""

    root: Path
    names: Strings  # of the files, relative to root or absolute
    rows: Rows  # which of them belong to the split
    labels: np.ndarray | None  # (len(names),); None without labels
    classes: Sequence[str]
    channels: int
    max_pixels: int = MAX_PIXELS
    orient: Orient = "exif"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        label = -1 if self.labels is None else int(self.labels[self.rows[index]])
        data, name = self.stored(index), self.name(index)
        image = decode(data, name, self.channels, max_pixels=self.max_pixels, orient=self.orient)
        return image, label

    def stored(self, index: int) -> bytes:
        """The content of the file of an image."""
        return read_regular(self.file(index))

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """The path of the file of an image."""
        return self.root / self.names[self.rows[index]]

    def stamp(self) -> str:
        """A stamp of the files of the split, their labels and channels."""
        files = (self.root / self.names[row] for row in self.rows)
        labels = None if self.labels is None else self.labels[self.rows]
        return stamp_of(files, (list(self.classes), self.channels, self.orient), labels)


def stamp_of(files: Iterable[Path], settings: object, *columns: np.ndarray | range | None) -> str:
    """A hash that changes when images change, of names, sizes and modification times; reads no file.

    A changed file has the old stamp only if its size and its modification time, in nanoseconds, are the same.

    Args:
        files: all files; a missing one is hashed as missing.
        settings: what else decides the images of the source; its repr() is hashed.
        columns: numbers for each image, such as labels.
    """
    stamp = blake2b(digest_size=16)
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "absent"
        stamp.update(encode(f"{file.absolute()}\0{state}\n"))
    stamp.update(repr(settings).encode())
    for column in columns:
        if column is not None:
            stamp.update(np.ascontiguousarray(column, np.int64).tobytes())
    return stamp.hexdigest()


def existing(path: str) -> Path:
    """The path, which must exist.

    Raises:
        ValueError: if it does not; the message has the nearest existing folder and its content.
    """
    expanded = Path(path).expanduser()
    if expanded.exists():
        return expanded
    absolute = expanded.absolute()
    parent = next(folder for folder in absolute.parents if folder.is_dir())
    missing = absolute.relative_to(parent).parts[0]
    have = sorted(item.name for item in parent.iterdir() if not item.name.startswith("."))
    raise ValueError(
        f"path='{path}': there is no such file or folder, looked for from {Path.cwd()}. The nearest "
        f"existing folder is {parent}, which has no '{missing}'.{registry.suggest(missing, have)} It "
        f"contains: {_first(have)}."
    )


def check_below(name: str, file: Path) -> None:
    """Refuse the name of an image in a file of annotations that leads out of the folder of images.

    Raises:
        ValueError: with the name and the file.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{file} names the image {name!r}, which is not below the folder of images.")


def wrong_kind(path: Path, expected: str) -> ValueError:
    """The error for a path that another source reads; `expected` is what this source reads."""
    other = "folder" if path.is_dir() else SOURCE_OF_SUFFIX.get(path.suffix.lower(), "")
    kind = "a folder" if path.is_dir() else "a file"
    hint = f" To read it, set name={other} in the same section." if other else ""
    return ValueError(f"path='{path}' is {kind}, but this source reads {expected}.{hint}")


def report_left_out(path: Path | str, others: Counter[str], wanted: str = "images") -> None:
    """Say once how many files of which other suffixes a source leaves out. `wanted`: what it reads."""
    found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(12))
    text = f"path='{path}': left out, because they are no {wanted} that dinokit reads: {found}"
    images = wanted.startswith("images")
    if images and any(suffix in HEIC for suffix in others):
        text += ". To read HEIC: pip install pillow-heif"
    if images and any(suffix in dicom.SUFFIXES for suffix in others):
        text += f". To read DICOM: {dicom.INSTALL}"
    if found and text not in _reported:
        _reported.add(text)
        info(text)


def nothing_found(path: Path, expected: Iterable[str], others: Counter[str]) -> ValueError:
    """The error for a folder that has only files with the suffixes `others`."""
    if not others:
        return ValueError(f"path='{path}' has no file at all; searched for {', '.join(expected)}.")
    found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(6))
    names = {SOURCE_OF_SUFFIX.get(suffix, "hf" if suffix == ".arrow" else "") for suffix in others}
    readers = sorted(names - {"", "manifest"})
    hint = f" To read those, set name={' or '.join(readers)} in the same section." if readers else ""
    if "manifest" in names:
        hint += " If one of them is a list of images, give its own path."
    return ValueError(f"path='{path}' has no {', '.join(expected)}; it has: {found}.{hint}")


def shards(path: str, suffix: str) -> list[Path]:
    """The files that `path` means: a file, a folder of files, a glob, or several as in WebDataset.

    Several are a range like part-{000..011}.tar, a list like {a,b}.tar, both together, or paths with ::
    between them.

    Raises:
        ValueError: if there is none, one of several is missing, or the path is a URL or a command.
    """
    if path.startswith("pipe:") or "://" in path:
        raise ValueError(
            f"path='{path}' is on another machine, and images are read from any place of a file: copy the "
            f"files to a disk of this machine first, as with wget or rclone copy, and give their path."
        )
    ranged = [name for part in path.split("::") for name in _expand_braces(part)]
    if len(ranged) > 1:
        missing = [name for name in ranged if not Path(name).expanduser().is_file()]
        if missing:
            raise ValueError(
                f"path='{path}' means {len(ranged)} files; {len(missing)} are missing: {_first(missing)}."
            )
        return [Path(name).expanduser() for name in ranged]
    expanded = Path(path).expanduser()
    if any(mark in path for mark in "*?[") and not expanded.exists():
        found = sorted(Path(expanded.anchor).glob(str(expanded.relative_to(expanded.anchor))))
        found = [file for file in found if file.is_file()]
        if not found:
            raise ValueError(f"path='{path}' matches no file, searched from {Path.cwd()}.")
        return found
    one = existing(path)
    if not one.is_dir():
        return [one]
    inside = [file for file in one.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(one))]
    found = sorted(file for file in inside if file.suffix.lower() == suffix)
    if not found:
        raise nothing_found(one, [suffix], Counter(file.suffix.lower() for file in inside))
    return found


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _expand_braces(path: str) -> Iterator[str]:
    """The paths that {000..011} and {a,b} stand for, from left to right, also inside each other."""
    start = path.find("{")
    depths = list(accumulate({"{": 1, "}": -1}.get(c, 0) for c in path[start:])) if start >= 0 else []
    if 0 not in depths or Path(path).expanduser().exists():
        yield path
        return
    end = start + depths.index(0)
    inside, commas = path[start + 1 : end], [start]
    commas += [start + i for i, depth in enumerate(depths) if depth == 1 and path[start + i] == ","]
    ranged = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ranged:
        first, last = ranged.groups()
        words = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    elif len(commas) > 1:
        words = [path[a + 1 : b] for a, b in pairwise([*commas, end])]
    else:  # braces of a name
        yield from (f"{path[: end + 1]}{rest}" for rest in _expand_braces(path[end + 1 :]))
        return
    for word in words:
        yield from _expand_braces(f"{path[:start]}{word}{path[end + 1 :]}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
