"""Loader processes themselves: how many, what they answer to, and which errors mean an unreadable image."""

import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinokit.runtime.distributed import cpu_cores, memory

MOST_WORKERS = 16
IN_FLIGHT = 0.25  # share of this process's memory that batches which wait may take
UNREADABLE = OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError


class Steps:
    """For each step, this process's places in it."""

    def __init__(self, start: int, stop: int, places: Sequence[int]) -> None:
        self.steps, self.places = range(start, stop), places

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(step, place) for place in self.places] for step in self.steps)


def data_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    collate_fn: Callable[[Any], Any],
    workers: int,
    pin: bool,
    batch_bytes: int = 0,
) -> DataLoader[Any]:
    """A DataLoader whose workers leave signals to this process, and which draws nothing from torch's dice.

    With `batch_bytes` of a batch, what they hold ready stays below IN_FLIGHT of the memory, if need be by
    fewer workers than cores, though one holds one batch at the least. As many as were asked for there are.
    """
    most = int(memory() * IN_FLIGHT) // batch_bytes if batch_bytes else sys.maxsize  # batches
    workers = min(_spare_cores(), max(most, 1)) if workers < 0 else workers
    ready = 2 if 2 * workers <= most else 1  # batches a worker
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=workers,
        prefetch_factor=ready if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # else it would draw from torch's own, and change what training draws
    )


def _spare_cores() -> int:
    return min(MOST_WORKERS, cpu_cores() - 1)


def _leave_signals_to_the_parent(_: int) -> None:
    """Make a worker deaf to Ctrl-C and to a scheduler's warning, which reach every process of a job at once.

    The parent answers them, and still needs batches to end in order. Its own SIGTERM is obeyed: Python sends
    one to each child when it ends, and then waits for them.
    """
    for name in {"SIGINT", "SIGUSR1", "SIGUSR2"} & signal.Signals.__members__.keys():  # Windows has the first
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none; there a SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_asks, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
