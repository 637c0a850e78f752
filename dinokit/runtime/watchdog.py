"""A watchdog: a process that makes no progress for some minutes prints where it hangs, and exits."""

import faulthandler
import math
import sys
import threading
import time
from typing import IO, Self

from dinokit.runtime.distributed import rank

BEFORE = 0.5  # seconds before the exit at which the reason is printed


class Watchdog:
    """For the length of a block, a process must call reset() often enough, or it exits.

    The stack traces are printed without Python's lock, which a process may hold while it hangs; the sentence
    in front of them needs the lock, and is missing then.

    Args:
        minutes: that a process may make no progress: `run.timeout_minutes`.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.deadline = minutes, math.inf
        self.closed = threading.Event()
        self.reporter = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> Self:
        self.reporter.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.closed.set()
        self.reporter.join()

    def reset(self) -> None:
        """There was progress: from now on the process has `minutes` again."""
        self.deadline = time.monotonic() + self._patience
        faulthandler.dump_traceback_later(self.minutes * 60, exit=True, file=_stderr())

    def pause(self) -> None:
        """Wait for no progress until the next reset()."""
        self.deadline = math.inf
        faulthandler.cancel_dump_traceback_later()

    @property
    def _patience(self) -> float:
        return self.minutes * 60 - BEFORE

    def _report(self) -> None:
        # Never wait longer than the patience: reset() may set a deadline while this thread sleeps.
        while not self.closed.wait(min(self._patience, max(self.deadline - time.monotonic(), 0.01))):
            if time.monotonic() >= self.deadline:
                _stderr().write(
                    f"process {rank()} made no step for run.timeout_minutes={self.minutes:g}, and exits. If "
                    f"it is only slow, give it more minutes. It is here, thread by thread:\n"
                )
                _stderr().flush()
                return


def _stderr() -> IO[str]:
    return sys.__stderr__ or sys.stderr
