"""A clock that a run winds up at every step: one that stands still says so, shows where, and ends."""

import faulthandler
import math
import sys
import threading
import time
from typing import IO, Self

from dinokit.runtime.distributed import rank

BEFORE = 0.5  # seconds before the end in which it is said why


class Watchdog:
    """For the length of a block, a process must move, or it ends.

    Where it hangs is shown without Python's lock, which a process may hold while it hangs; the sentence in
    front of that needs the lock, and is missing then.

    Args:
        minutes: that a process may stand still, of `run.timeout_minutes`.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.due = minutes, math.inf
        self.over = threading.Event()
        self.teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Self:
        self.teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.over.set()
        self.teller.join()

    def wind(self) -> None:
        """It moves: from now on it has `minutes` again."""
        self.due = time.monotonic() + self._patience
        faulthandler.dump_traceback_later(self.minutes * 60, exit=True, file=_stderr())

    def pause(self) -> None:
        """What comes now may take as long as it likes."""
        self.due = math.inf
        faulthandler.cancel_dump_traceback_later()

    @property
    def _patience(self) -> float:
        return self.minutes * 60 - BEFORE

    def _tell(self) -> None:
        # Never longer than the patience: then it cannot sleep through the end of a clock wound up meanwhile.
        while not self.over.wait(min(self._patience, max(self.due - time.monotonic(), 0.01))):
            if time.monotonic() >= self.due:
                _stderr().write(
                    f"process {rank()} made no step for run.timeout_minutes={self.minutes:g}, and ends. If "
                    f"it is only slow, give it more minutes. It is here, thread by thread:\n"
                )
                _stderr().flush()
                return


def _stderr() -> IO[str]:
    return sys.__stderr__ or sys.stderr
