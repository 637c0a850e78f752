"""How glibc keeps memory for the steps of a training on a CPU. Of another C library, nothing is changed.

PyTorch asks for every tensor with posix_memalign, and gives it back when it is not read any more: gigabytes a
step, in a few sizes.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

VARIABLE, KEY = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
BEGUN = "dinokit-has-begun-again"


def keep_freed(on: bool = True) -> None:
    """Let this process keep what a step frees for the next one.

    glibc gives large blocks back to the kernel at once, which hands them out again page by page, each filled
    with zeros first: a fifth of the time of a step. And what begin_again() takes from a thread's cache would
    go to the fast bins, which keep small blocks apart in the same way.
    """
    library = _glibc()
    if on and library is not None:
        largest_fast, trim_threshold, mmap_max = 1, -1, -4  # from malloc.h
        library.mallopt(largest_fast, 0)
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, -1)  # never


def begin_again() -> None:
    """Start this program anew, as the same process, without glibc's caches of small blocks, if it has them.

    For a block at a multiple of 64 glibc takes up to 96 bytes more than are asked for, and frees the rest. A
    thread's cache keeps rests of that size, so that two blocks which are free do not become one, and a free
    one is too short for the next tensor of the same size: a sixth of a step's memory is such gaps. Only the
    environment can say so, before a program starts. A value that it has already stays.
    """
    change = _without_small_caches()
    if not change or not sys.executable or BEGUN in sys._xoptions:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # A mark in the words too, for an environment may be emptied on the way; and a run that cannot begin again
    # is as right as one that has, only larger.
    with suppress(OSError):
        words = [sys.executable, "-X", BEGUN, *sys.orig_argv[1:]]
        os.execve(sys.executable, words, {**os.environ, **change})


@contextmanager
def for_children(on: bool) -> Iterator[None]:
    """Processes that are started inside of it begin as begin_again() would have them, if `on`."""
    before = os.environ.get(VARIABLE)
    if on:
        os.environ.update(_without_small_caches())
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _without_small_caches() -> dict[str, str]:
    """What the environment lacks: nothing if it says something of these caches, or nobody would read it."""
    there = os.environ.get(VARIABLE, "")
    if _glibc() is None or KEY in there:
        return {}
    return {VARIABLE: f"{there}:{KEY}=0" if there else f"{KEY}=0"}


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
