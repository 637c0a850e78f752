"""How a run is told to stop: Ctrl-C, kill or a scheduler's warning; all processes stop after one step."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dinokit.distributed import all_reduce_max, rank

STOPS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2  # from kill, and from SLURM before it ends a job


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C or a signal of STOPS asks the loop to save and end; a second Ctrl-C ends at once.

    Launchers and schedulers repeat themselves: that changes nothing, even when the block has been left.

    What is yielded says whether any process was asked, the same in all; all must call it equally often. It
    costs one number to every process, between CPUs, and no wait for a GPU.
    """
    asked: list[int] = []
    agreed = 0

    def stopping() -> bool:
        nonlocal agreed
        agreed = int(all_reduce_max(torch.tensor(max(asked, default=0), dtype=torch.int32)))
        return bool(agreed)

    def ask(number: int, _: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        if number == signal.SIGINT and rank() == 0:
            os.write(2, b"\nstops after this step; Ctrl-C again ends at once, and loses what was not saved\n")
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, *STOPS)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            # All has been saved, and what is left is to end: with the status that says so.
            spent = agreed in STOPS and number in STOPS
            signal.signal(number, signal.SIG_IGN if spent else handler)
