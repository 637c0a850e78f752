"""Atomic writes: a file or folder is either complete or not there, also after a crash."""

import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Literal

CHECKSUMS = "checksums.json"
TEMPORARY = ".*.part"  # names of unfinished files


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read. A FIFO or a device, which may block or never end, is refused, also behind a link.

    Raises:
        OSError: if it is none, or cannot be opened; the message names it.
    """
    if "\0" in str(path):
        raise OSError(f"{str(path)!r} has a NUL, which no file name has: the list that names it is damaged.")
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise OSError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file.")
    return Path(path).open("rb")


def read_regular(path: str | Path) -> bytes:
    """The content of a file. Raises as open_regular()."""
    with open_regular(path) as file:
        return file.read()


def open_own(path: Path, mode: Literal["a", "r+"]) -> IO[str]:
    """Open a text file of our own to append or to change; it is made if it is missing.

    Raises:
        ValueError: for a link, a FIFO or a device.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_APPEND if mode == "a" else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise ValueError(f"{path} is a link, and what it points to would be changed: remove it.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a file: remove it.")
    return os.fdopen(descriptor, mode, encoding="utf-8", errors="replace")


def printable(text: str) -> str:
    """The text on one line: control characters, which could forge a line or move the cursor, are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, that file replaces `path` in one move.

    If the block raises, or the process dies in it, an older file at `path` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the host name, because several machines may write here with the same process id.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder; when the block ends without an error, its files move beside `path`.

    For several files, or files to be checked before they replace others. Files have their final names inside
    the folder and are moved one by one, in order of names; other files in the target stay. If the block
    raises, or the process dies in it, older files are unchanged. Only one process at a time may write.

    A folder among them gets a file CHECKSUMS, which is moved first: after a kill between two moves,
    check_folder() refuses the mixture.
    """
    place = Path(path).resolve()
    folder = place.with_name(f".{place.name}.aside.part")
    remove(folder)  # of a process that died
    folder.mkdir(parents=True)
    try:
        yield folder
        if (folder / place.name).is_dir():
            written = sorted(p for p in (folder / place.name).iterdir() if p.is_file())
            sums = {path.name: sha256_of(path) for path in written}
            write_text(folder / place.name / CHECKSUMS, json.dumps(sums, indent=1))
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        for temporary in sorted(files, key=lambda path: path.name != CHECKSUMS):
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            target = place.parent / temporary.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            temporary.replace(target)
            sync_folder(target.parent)
    finally:
        remove(folder)


def check_folder(folder: Path) -> None:
    """Compare the files of a folder that aside() wrote with its CHECKSUMS; other folders pass.

    Raises:
        ValueError: if one is another, as after a kill while they were replaced.
    """
    if not (folder / CHECKSUMS).exists():
        return
    try:
        sums = dict(json.loads(read_regular(folder / CHECKSUMS)))
        wrong = [name for name in sums if Path(name).name != name or sha256_of(folder / name) != sums[name]]
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged: {error}. Export it again.") from None
    if wrong:
        raise ValueError(
            f"{folder} is damaged: {', '.join(wrong)} does not match {CHECKSUMS}, as when an export was "
            f"killed. Export it again."
        )


def sha256_of(path: Path) -> str:
    """Of the content of a file, as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: str | Path) -> None:
    """Write a folder's entries to disk; without it a move into the folder can be lost in a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or folder if it exists. A folder is renamed first, so that nobody reads half of it."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.match(TEMPORARY):
        hidden = path.with_name(f".{path.name}.gone.part")
        shutil.rmtree(hidden, ignore_errors=True)
        path = path.rename(hidden)
    shutil.rmtree(path)


def unused(path: Path) -> Path:
    """`path`, or with _2, _3, ... before its ending if there is such a file already."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}_{number}")
    return candidate
