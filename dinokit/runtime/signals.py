"""Stop signals: Ctrl-C, kill or a scheduler's warning ask a command to save and end."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinokit.runtime.distributed import max_of_everyone, rank

LIBC = ctypes.CDLL(None)  # opened here, because end_with_parent() runs between fork and exec
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2  # from kill, and from SLURM before a job ends


class Stopped(KeyboardInterrupt):
    """All processes stopped at the same place because one of them received a stop signal."""


class StopSignal:
    """Signal handler that records the stop signals which this process receives.

    Args:
        between_items: whether log.watch() stops between two items; if not, the caller asks after every step.
    """

    def __init__(self, between_items: bool) -> None:
        self.between_items = between_items
        self.received: list[int] = []  # signals to this process
        self.received_anywhere = 0  # a signal to any process, 0 if none; known since on_any_process()

    def __call__(self, number: int, _: object) -> None:
        """Record a signal.

        Raises:
            KeyboardInterrupt: at the second Ctrl-C, which ends the command at once.
        """
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        if number == signal.SIGINT and rank() == 0:
            unit = "batch or step" if self.between_items else "step"
            text = f"\nstops after the current {unit}; press Ctrl-C again to stop at once without saving\n"
            os.write(2, text.encode())
        self.received.append(number)

    def on_this_process(self) -> bool:
        """Whether this process received a stop signal."""
        return bool(self.received)

    def on_any_process(self) -> bool:
        """Whether any process received a stop signal. All processes must call this equally often.

        It reduces one number between CPUs and does not wait for a GPU.
        """
        latest = torch.tensor(max(self.received, default=0), dtype=torch.int32)
        self.received_anywhere = int(max_of_everyone(latest))
        return bool(self.received_anywhere)


@contextmanager
def stop_signals(between_items: bool = False) -> Iterator[StopSignal]:
    """Handle Ctrl-C and STOP_SIGNALS inside the block as requests to save and end.

    Blocks may be nested: an inner block starts with the signals that the outer one received, and hands its
    own to the outer one. After a stop the outermost block ignores STOP_SIGNALS, because launchers and
    schedulers send them repeatedly and the process should still end with its own exit status.

    Args:
        between_items: as for StopSignal.
    """
    stop = StopSignal(between_items)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, *STOP_SIGNALS)}
    outer = before[signal.SIGINT]
    if isinstance(outer, StopSignal):
        stop.received += outer.received
    try:
        yield stop
    finally:
        received = {stop.received_anywhere, *stop.received} - {0}
        ending = not isinstance(outer, StopSignal) and not received.isdisjoint(STOP_SIGNALS)
        for number, handler in before.items():
            ignored = ending and number in STOP_SIGNALS
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        if isinstance(outer, StopSignal):
            outer.received += received


def should_stop(together: bool) -> bool:
    """Whether to stop between two items; False outside stop_signals(between_items=True).

    log.watch() calls this. It finds the StopSignal as the handler of this process.

    Args:
        together: whether all processes ask equally often, and stop if any of them received a signal.
    """
    stop = signal.getsignal(signal.SIGINT)
    if not isinstance(stop, StopSignal) or not stop.between_items:
        return False
    return stop.on_any_process() if together else stop.on_this_process()


def end_with_parent() -> None:
    """Have this process killed when its parent ends, even by kill -9; for `preexec_fn` of subprocess.Popen.

    Only Linux can do that; elsewhere the process lives on.
    """
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PARENT_DEATH, signal.SIGKILL)
