"""Files that are either whole or not there: everything a run leaves behind is written through this."""

import os
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
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it the move itself can be lost in a power cut
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
