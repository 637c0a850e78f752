"""How a command is told to stop: Ctrl-C, kill or a scheduler's warning; all processes stop at one place."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinokit.runtime.distributed import all_reduce_max, rank

STOPS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2  # from kill, and from SLURM before it ends a job


class Stopped(KeyboardInterrupt):
    """All processes stopped at the same place, as one of them was asked to."""


class Told:
    """Whether a command was told to stop: the handler of the signals, which notes each.

    Args:
        between_items: whether whatever goes through log.watch() stops there; else the command asks for itself
            after every step.
    """

    def __init__(self, between_items: bool) -> None:
        self.between_items = between_items
        self.asked: list[int] = []  # what this process was sent
        self.agreed = 0  # what one of all was sent, when they last agreed

    def __call__(self, number: int, _: object) -> None:
        """Note a signal; a second Ctrl-C ends at once.

        Raises:
            KeyboardInterrupt: at that.
        """
        if number == signal.SIGINT and number in self.asked:
            raise KeyboardInterrupt
        if number == signal.SIGINT and rank() == 0:
            now = "the batch, step or C that it is at" if self.between_items else "this step"
            text = f"\nstops after {now}; Ctrl-C again ends at once, and loses what was not saved\n"
            os.write(2, text.encode())
        self.asked.append(number)

    def here(self) -> bool:
        """Whether this process was."""
        return bool(self.asked)

    def anywhere(self) -> bool:
        """Whether any process was, the same in all; all must call it equally often.

        It costs one number to every process, between CPUs, and no wait for a GPU.
        """
        self.agreed = int(all_reduce_max(torch.tensor(max(self.asked, default=0), dtype=torch.int32)))
        return bool(self.agreed)


@contextmanager
def stop_signals(between_items: bool = False) -> Iterator[Told]:
    """While open, Ctrl-C or a signal of STOPS asks to save and end; a second Ctrl-C ends at once.

    Launchers and schedulers repeat themselves: that changes nothing, even when the block has been left. The
    whole process is meant: a block begins with what the one around it heard, and gives back what it hears.

    Args:
        between_items: as Told.
    """
    told = Told(between_items)
    before = {number: signal.signal(number, told) for number in (signal.SIGINT, *STOPS)}
    around = before[signal.SIGINT]
    if isinstance(around, Told):
        told.asked += around.asked
    try:
        yield told
    finally:
        outermost = not isinstance(around, Told)
        for number, handler in before.items():
            # All has been saved or done, and what is left is to end: with the status that says so.
            spent = outermost and number in STOPS and not {told.agreed, *told.asked}.isdisjoint(STOPS)
            signal.signal(number, signal.SIG_IGN if spent else handler)
        if isinstance(around, Told):
            around.asked += {told.agreed, *told.asked} - {0}


def stop_here(together: bool) -> bool:
    """Whether to stop between two items, if that is listened to.

    log.watch() asks, far below whoever listens: it need not be handed down, for it is this process's handler.

    Args:
        together: whether all processes ask this equally often, and stop if one was told.
    """
    told = signal.getsignal(signal.SIGINT)
    if not isinstance(told, Told) or not told.between_items:
        return False
    return told.anywhere() if together else told.here()
