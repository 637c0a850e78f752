"""How a command ends: its exit status, its result as JSON, and its errors in words.

0 success; 1 an unexpected error; 2 wrong usage; 3 data or files; 4 a training that stopped by itself;
5 memory; 130 a stop signal.
"""

import json
import math
import os
import re
import select
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Any

from dinokit.config import registry

UNEXPECTED, USAGE, DATA, STOPPED, MEMORY, INTERRUPTED = 1, 2, 3, 4, 5, 130
READERS = (
    "data",
    "features",
    "hub",
    "report",
    "results",
    "viz",
    "weights",
)  # rooms that read files
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)


def exit_status(error: BaseException) -> int:
    """The exit status for an error.

    An error of dinokit that does not name its status is one of data if the code that raised it reads data,
    else one of usage.
    """
    if isinstance(getattr(error, "exit_status", None), int):
        return int(error.exit_status)  # type: ignore[attr-defined]
    torchs = type(error).__name__ == "OutOfMemoryError"  # without importing torch
    if torchs or isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
        return MEMORY
    if isinstance(error, OSError):
        return DATA
    if foreign_place(error) or not isinstance(error, ValueError | LookupError | RuntimeError):
        return UNEXPECTED
    frames = traceback.extract_tb(error.__traceback__)
    roots = _roots()
    ours = [frame for frame in frames if roots & set(Path(frame.filename).resolve().parents)]
    if isinstance(error, RuntimeError) and (not ours or ours[-1] is not frames[-1]):
        return UNEXPECTED
    if not ours or ours[-1].name == "__post_init__":
        return USAGE
    below = Path(ours[-1].filename).resolve().relative_to(Path(str(files("dinokit"))).resolve().parent)
    room = Path(below.parts[1]).stem if below.parts[0] == "dinokit" else below.parts[0]
    return DATA if room in READERS and not isinstance(error, RuntimeError) else USAGE


def error_text(error: BaseException) -> str:
    """The message of an error; one that was not written for users has its type and place as well."""
    first = isinstance(error, KeyError | SyntaxError) and error.args  # str() quotes it, or adds a place
    text = str(error.args[0] if first else error)
    if place := foreign_place(error):
        return f"{type(error).__name__}: {text} ({place}; --traceback shows more)"
    return text


def foreign_place(error: BaseException) -> str:
    """The last line of the user's own code that an error came through; "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}, line {error.lineno}"
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        above = set(Path(frame.filename).resolve().parents)
        packages = {folder / name for folder in map(Path, sys.path) for name in registry.trusted()}
        foreign = not above & (_roots() | libraries) and "site-packages" not in frame.filename
        if (foreign or above & packages) and Path(frame.filename).is_file():
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return ""


def _roots() -> set[Path]:
    return {Path(str(files(name))).resolve() for name in ("dinokit", "dinokit.eval", "dinokit.slurm")}


@contextmanager
def streams(flags: Mapping[str, str]) -> Iterator[None]:
    """Where a command prints: with --json, all of it on standard error; with --quiet, nowhere."""
    if "--quiet" in flags:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,  # noqa: PTH123, it is no file
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
    elif "--json" in flags:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def as_json(result: Mapping[str, Any]) -> str:
    """One line of JSON; paths are written as text, and numbers that JSON does not have as null."""
    return json.dumps(_plain(result), default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    try:
        sys.stdout.flush()
        look = select.poll()  # unbuffered output leaves nothing to flush
        look.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in look.poll(0)):
            return False
    except BrokenPipeError:
        pass
    except (AttributeError, OSError, ValueError):  # no poll() on Windows; no file behind the output in a test
        return False
    # What is still buffered would raise the same again when Python exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
