"""Shared by sources: image files, the meaning of a path, and a stamp that changes when images change."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from dinokit.config import registry
from dinokit.data.decode import ImageLike, decode
from dinokit.data.names import Strings, encode
from dinokit.data.sources._labels import Rows

_READERS = {".parquet": "parquet", ".tar": "tar", ".txt": "manifest", ".csv": "manifest"}


@dataclass
class ImageFiles:
    """A source of image files, by their names below a folder."""

    root: Path
    names: Strings  # of the files, relative to root or absolute
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
        """The content of the file of an image."""
        return self.file(index).read_bytes()

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
        return stamp_of(files, (list(self.classes), self.channels), labels)


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


def wrong_kind(path: Path, expected: str) -> ValueError:
    """The error for a path that another source reads; `expected` is what this source reads."""
    other = "folder" if path.is_dir() else _READERS.get(path.suffix.lower(), "")
    kind = "a folder" if path.is_dir() else "a file"
    hint = f" To read it, set name={other}." if other else ""
    return ValueError(f"path='{path}' is {kind}, but this source reads {expected}.{hint}")


def nothing_found(path: Path, expected: Iterable[str], others: Counter[str]) -> ValueError:
    """The error for a folder that has only files with the suffixes `others`."""
    if not others:
        return ValueError(f"path='{path}' has no file at all; searched for {', '.join(expected)}.")
    found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(6))
    readers = sorted({_READERS[suffix] for suffix in others if suffix in _READERS})
    hint = f" To read those, set name={' or '.join(readers)}." if readers else ""
    return ValueError(f"path='{path}' has no {', '.join(expected)}; it has: {found}.{hint}")


def shards(path: str, suffix: str) -> list[Path]:
    """The files that `path` means: a file, a folder of files, a glob, or a range like part-{000..011}.tar.

    Raises:
        ValueError: if there is none, or one of a range is missing.
    """
    ranged = list(_expand_range(path))
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


def _expand_range(path: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        yield path
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand_range(f"{path[: match.start()]}{number:0{len(first)}}{path[match.end() :]}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
