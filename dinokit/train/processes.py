"""Processes that start, agree, stop and fail together. Alone, a process has nobody to agree with.

A process that fails writes so into the store that all share. The others see it within a second and end,
quietly: what is printed first is what went wrong, where it went wrong, and not another's broken connection.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import dinokit
from dinokit.config.load import Recipe
from dinokit.data.sources import ImageSource
from dinokit.runtime.device import pick_device
from dinokit.runtime.distributed import Launch, broadcast, gather_objects, launch, rank, world_size
from dinokit.runtime.signals import Stopped
from dinokit.train.watchdog import Watchdog

FAILED = "failed"  # the store's key for who failed first
LATER = 60.0  # seconds by which the wait for others outlasts the watchdog's, which shows where one hangs
GRACE = 5.0  # seconds that a process has to end by itself when another failed
PATIENCE = 2.0  # seconds in which the cause of a lost connection may be told
LOST = "onnection", "gloo", "NCCL", "Timed out"  # words of the errors that follow from another process's end
NAMES = 64  # images whose names are compared
SENTENCES = ValueError, LookupError, OSError, KeyboardInterrupt  # errors that say all in their message


@contextmanager
def joined(device: torch.device, minutes: float) -> Iterator[Watchdog]:
    """Be one of the processes that were started together, for the length of the block; gives its watchdog.

    Args:
        device: that of run.device; with several GPUs on a node, each process takes its own.
        minutes: how long a process waits for the others before it gives up; also for itself: see Watchdog.

    Raises:
        ValueError: if there are more processes than GPUs on this node.
        SystemExit: if another process failed, which has said why.
        Stopped: if it was raised in the block, in all processes.
    """
    ours = launch()
    if ours.world == 1:
        with Watchdog(minutes) as watchdog:
            yield watchdog
        return
    _take_gpu(device, ours)
    wait = timedelta(minutes=minutes)
    longer = wait + timedelta(seconds=LATER)
    address = "env://" if ours.by == "torchrun" else f"tcp://{ours.address}:{ours.port}"
    store, _, _ = next(rendezvous(address, ours.rank, ours.world, timeout=wait))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ours.rank, world_size=ours.world, timeout=longer)
    over = threading.Event()
    watch = threading.Thread(target=_end_with_the_others, args=(store.clone(), over), daemon=True)
    watch.start()
    try:
        with Watchdog(minutes) as watchdog:
            yield watchdog
        _part(over, watch)
    except Stopped:
        _part(over, watch)
        raise
    except BaseException as error:
        first = _first_to_fail(store, error)
        _leave(over, watch)
        if not first and not isinstance(error, KeyboardInterrupt):
            raise SystemExit(1) from None
        if not isinstance(error, SENTENCES) and not type(error).__module__.startswith("dinokit"):
            sys.stderr.write(f"process {ours.rank} of {ours.world}, on {socket.gethostname()}, failed:\n")
            traceback.print_exception(error)
        raise


def agree(recipe: Recipe, source: ImageSource, out: Path) -> None:
    """Compare what every process would train on, and whether all see the same `run.out`.

    Raises:
        ValueError: naming two processes that differ, their hosts, and in what.
    """
    if world_size() == 1:
        return
    prints = gather_objects(seen_here(recipe, source))
    for number, print_ in enumerate(prints):
        for what, value in print_.items():
            if what != "host" and value != prints[0][what]:
                raise ValueError(
                    f"Process {number} (on {print_['host']}) has another {what} than process 0 (on "
                    f"{prints[0]['host']}): {value}, not {prints[0][what]}. All processes must be given the "
                    f"same command, code and data: is the same folder mounted at the same place everywhere?"
                )
    token = broadcast(os.urandom(8).hex())
    mark = out / f".{token}.part"
    if rank() == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    gather_objects(None)
    blind = [host for host in gather_objects(None if _appears(mark) else socket.gethostname()) if host]
    if rank() == 0:
        mark.unlink()
    if blind:
        raise ValueError(
            f"run.out={out} is not one folder for all processes: what process 0 (on {prints[0]['host']}) "
            f"writes there is not seen on {', '.join(dict.fromkeys(blind))}. Give a folder that all nodes "
            f"share, with its full path."
        )


def seen_here(recipe: Recipe, source: ImageSource) -> dict[str, Any]:
    """What must be the same in every process, in words that can be compared and shown."""
    return {
        "host": socket.gethostname(),
        "version of dinokit": dinokit.__version__,
        "version of torch": torch.__version__,
        "recipe": _digest({**asdict(recipe), "data": None}),
        "kind of device": pick_device(recipe.run.device).type,
        **images_of(source),
    }


def images_of(source: ImageSource) -> dict[str, Any]:
    """What must stay the same of the images when a run goes on, as well."""
    n = len(source)
    names = [source.name(i * n // NAMES) for i in range(min(NAMES, n))]
    return {
        "number of images": n,
        "order of images": f"{_digest(names)} (the first is {names[0] if names else 'none'})",
    }


def _part(over: threading.Event, watch: threading.Thread) -> None:
    gather_objects(None)  # nobody leaves, and takes the store along, while another still works
    over.set()
    watch.join()
    dist.destroy_process_group()


def _leave(over: threading.Event, watch: threading.Thread) -> None:
    """After a failure: end within GRACE, whatever else hangs, and by a thread that is not in the store.

    A thread that is in the store's C++ code when the interpreter ends makes the process abort.
    """
    last = threading.Timer(GRACE, os._exit, [1])
    last.daemon = True
    last.start()
    over.set()
    watch.join(PATIENCE)


def _take_gpu(device: torch.device, ours: Launch) -> None:
    if device.type != "cuda":
        return
    if ":" in str(device):
        raise ValueError(
            f"run.device={device} is one GPU for {ours.world} processes: take run.device=cuda, and each "
            f"takes its own."
        )
    have = torch.cuda.device_count()
    own = have == 1 and ours.by == "SLURM"  # srun may show each task its own alone
    if ours.local_world > have and not own:
        raise ValueError(
            f"{ours.local_world} processes on {socket.gethostname()}, but {have} GPUs: start as many as GPUs."
        )
    torch.cuda.set_device(0 if own else ours.local_rank)


def _first_to_fail(store: Any, error: BaseException) -> bool:
    """Claim to be the first that failed. A lost connection is never first: its cause gets time to be told."""
    ours = f"{rank()}"
    try:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            error.add_note(
                "Another process is gone, and said nothing: was it killed, perhaps for want of memory, or "
                "does it hang?"
            )
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not store.check([FAILED]):
                time.sleep(0.05)
        return store.compare_set(FAILED, "", ours).decode() == ours
    except (RuntimeError, OSError):
        # The store went with the process that held it, which failed before, with or without a word.
        sys.stderr.write(f"process {rank()} ends, because process 0 is gone\n")
        return False


def _end_with_the_others(store: Any, over: threading.Event) -> None:
    with suppress(RuntimeError, OSError):  # the process that held the store may be gone
        while not over.wait(1.0) and not store.check([FAILED]):
            pass
    if not over.wait(GRACE):
        sys.stderr.flush()
        os._exit(1)


def _appears(path: Path) -> bool:
    """Whether a file can be seen here, within the seconds that a network file system may take."""
    for _ in range(20):
        if path.exists():
            return True
        time.sleep(0.25)
    return False


def _digest(x: Any) -> str:
    return hashlib.sha256(json.dumps(x, sort_keys=True, default=str).encode()).hexdigest()[:12]
