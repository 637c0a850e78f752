"""Files that are either whole or not there: everything a run leaves behind is written through this."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTS = ".*.part"  # what files are called while they are written


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, its content becomes `path` in one move.

    If the block raises, or the process dies in it, whatever stood at `path` still stands there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Numbers of processes come again on other machines, which may write here too.
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """Give an empty hidden folder beside `path`; when the block ends well, what is in it moves to there.

    For one process at a time. For what is more than one file, or is to be looked at before it counts: inside
    the folder it has the names that it will have. Each file is moved whole, in the order of names, and other
    files in a folder that is there stay. If the block raises, or the process dies in it, whatever stood there
    still stands there.
    """
    place = Path(path).resolve()
    folder = place.with_name(f".{place.name}.aside.part")
    remove(folder)  # of a process that died
    folder.mkdir(parents=True)
    try:
        yield folder
        for part in sorted(p for p in folder.rglob("*") if p.is_file()):
            with part.open("rb") as file:
                os.fsync(file.fileno())
            target = place.parent / part.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            part.replace(target)
            sync_folder(target.parent)
    finally:
        remove(folder)


def sync_folder(path: str | Path) -> None:
    """Make what was moved into or out of a folder last: without it the move can be lost in a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; a folder under a hidden name: half of it is never met."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.match(PARTS):
        hidden = path.with_name(f".{path.name}.gone.part")
        shutil.rmtree(hidden, ignore_errors=True)
        path = path.rename(hidden)
    shutil.rmtree(path)
