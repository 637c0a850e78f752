"""Atomic writes: a file or folder is either complete or not there, also after a crash."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal

CHECKSUMS = "checksums.json"
TEMPORARY = ".*.part"  # names of unfinished files
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # beginnings of cells that programs for tables compute
FULL = {
    errno.ENOSPC: "the disk is full, or can take no more files",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file may not be so large (ulimit -f, or the file system)",
}


class DiskFullError(OSError):
    """A file does not fit on its disk.

    Args:
        fact: names the file, the reason and what is needed, without advice.
        number: of the system's error, one of FULL.
        written: bytes of the file that were on the disk.
    """

    def __init__(self, fact: str, number: int, written: int = 0) -> None:
        super().__init__(f"{fact}. Free some space there, or write to another disk.")
        self.fact, self.errno, self.written = fact, number, written

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as between processes."""
        return DiskFullError, (self.fact, self.errno, self.written)


def full_disk(error: BaseException, path: Path, temporary: Path | None = None) -> DiskFullError | None:
    """The error of a full disk behind `error`; None if there is none.

    Args:
        error: of a library, which may report a full disk in a way of its own.
        path: the file or folder to be written.
        temporary: its name until it is complete; None if something was to be appended to it.
    """
    if isinstance(error, DiskFullError) and not (temporary and temporary.is_dir()):
        return error
    behind: BaseException | None = error
    found = 0
    while behind is not None and not found:
        rust = re.search(r"\(os error (\d+)\)", str(behind))
        number = int(rust[1]) if rust else behind.errno if isinstance(behind, OSError) else None
        found = number if number in FULL else 0
        behind = behind.__cause__ or behind.__context__
    unknown = isinstance(error, OSError | RuntimeError) and getattr(error, "errno", None) is None
    if not found and unknown and path.parent.is_dir():  # some libraries forget the reason
        found = 0 if shutil.disk_usage(path.parent).free else errno.ENOSPC
    if not found:
        return None
    parts = [p for p in (temporary, *temporary.rglob("*")) if p.is_file()] if temporary else []
    there = sum(p.stat().st_size for p in parts)
    written = there + (error.written if isinstance(error, DiskFullError) else 0)
    fact = f"{path} could not be written: {FULL[found]}. It needs "
    fact += f"more than {written:,} bytes" if written else "space"
    if found == errno.ENOSPC:  # a quota, or the limit of a file, is not what the disk has free
        folder = next(each for each in (path.parent, *path.parent.absolute().parents) if each.is_dir())
        fact += f", and {folder} has room for {shutil.disk_usage(folder).free + there:,}"
    return DiskFullError(fact, found, written)


@contextmanager
def fits(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name `path` in the error if a disk is full in the block.

    Args:
        path: the file or folder that is written.
        temporary: as of full_disk().

    Raises:
        DiskFullError: for a full disk. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        full = full_disk(error, path, temporary)
        if full is None or full is error:
            raise
        raise full from None


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read. A FIFO or a device, which may block or never end, is refused, also behind a link.

    Raises:
        OSError: if it is none, or cannot be opened; the message names it. FileNotFoundError if it is missing.
    """
    if "\0" in str(path):
        raise OSError(f"{str(path)!r} has a NUL, which no file name has: the list that names it is damaged.")
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} cannot be read: there is no such file.") from None
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is {_kind(mode)}, not a file.")
    return Path(path).open("rb")


def read_regular(path: str | Path) -> bytes:
    """The content of a file. Raises as open_regular()."""
    with open_regular(path) as file:
        return file.read()


def check_target(path: str | Path) -> None:
    """Refuse a path where no file can be: a folder, a device, a FIFO, or a stream such as /dev/stdout.

    A command asks before its work, which would be lost. atomic() asks too: root may replace a device.

    Raises:
        OSError: with the path, what is there, and what to give.
    """
    path = Path(path)
    places = [str(path.parent.resolve() / path.name), str(path.readlink()) if path.is_symlink() else ""]
    if any(place.startswith("/proc/") for place in places):
        kind = "a stream"
    elif path.exists() and not path.is_file():
        kind = _kind(path.stat().st_mode)
    else:
        above = next((each for each in path.absolute().parents if each.exists()), path)
        if not above.is_file():
            return
        raise OSError(f"{path} cannot be written: {above} is a file, not a folder.")
    raise OSError(f"{path} is {kind}, and a file is to be written there: give the name of a file.")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_own(path: Path, mode: Literal["a", "r+"]) -> IO[str]:
    """Open a text file of our own to append or to change; it is made if it is missing.

    Raises:
        ValueError: for a link, a FIFO or a device.
        DiskFullError: as fits().
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_APPEND if mode == "a" else 0)
    try:
        with fits(path):
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


def json_record(line: str) -> dict[str, Any] | None:
    """The object in a line of JSON, None if it is none; numbers that no float holds are null."""

    def number(text: str) -> float | None:
        return value if math.isfinite(value := float(text)) else None

    def integer(text: str) -> int | None:
        return int(text) if len(text) < 19 else None

    try:
        found = json.loads(line, parse_float=number, parse_int=integer, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def text_cell(text: str) -> str:
    """The cell of a CSV with a text: `'` stands before one that a program for tables would compute."""
    return f"'{text}" if text.startswith(FORMULA) else text


def file_cell(name: str) -> str:
    """The cell of a CSV with the name of a file: `./` before such a name leaves it the name of that file."""
    return f"./{name}" if name.startswith(FORMULA) else name


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, that file replaces `path` in one move.

    If the block raises, or the process dies in it, an older file at `path` is unchanged.

    Raises:
        DiskFullError: as fits().
        OSError: as check_target().
    """
    path = Path(path)
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    long = len(os.fsencode(path.name)) > 100  # a name with more than 255 bytes would be refused
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest() if long else path.name
    # With the host name, because several machines may write here with the same process id.
    temporary = path.with_name(f".{name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with fits(path, temporary):
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

    Raises:
        DiskFullError: as fits().
    """
    place = Path(path).resolve()
    folder = place.with_name(f".{place.name}.aside.part")
    remove(folder)  # of a process that died
    folder.mkdir(parents=True)
    try:
        with fits(Path(path), folder):
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
    """The SHA-256 of the content of a file, as 64 hexadecimal digits."""
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
