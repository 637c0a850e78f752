"""Start, compare, stop and fail together: the processes of one command, with torch.distributed.

A process that fails writes so into the store that all share. The others see it within a second and exit
without a message, so what is printed first is the cause, and not another process's lost connection. A
Watchdog ends a process that hangs. run_lock() refuses a second run in the same folder: it is a kernel lock on
run.out/.lock, released when the process that has it ends, also between nodes on a shared file system.
"""

import errno
import faulthandler
import fcntl
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count, repeat
from pathlib import Path
from typing import IO, Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dinokit.runtime.distributed import (
    Launch,
    broadcast,
    connect,
    gather_objects,
    launch,
    rank,
    slurm_job_id,
    world_size,
)
from dinokit.runtime.files import open_own, printable
from dinokit.runtime.signals import Stopped

FAILED = "failed"  # key in the store: the rank of the process that failed first
LATER = 60.0  # seconds by which the wait for others outlasts the watchdog, which shows where one hangs
DAY = 86_400.0  # seconds that a process may be suspended if no other one waits for it
GRACE = 5.0  # seconds that a process has to exit by itself after another one failed
PATIENCE = 2.0  # seconds to wait for the cause of a lost connection
LOST = "onnection", "gloo", "NCCL", "Timed out"  # words of errors that follow from another process's exit
SELF_EXPLAINING = ValueError, LookupError, OSError, KeyboardInterrupt  # errors that need no traceback
TICK = 0.5  # seconds that a watchdog counts at a time
LOCK = ".lock"  # in a folder that a command writes
LEASE = 120.0  # seconds; a file server releases the locks of a lost machine after about 90 (NFS 4)
LOCKED = errno.EACCES, errno.EAGAIN  # errors of a lock that another process has
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # errors of a file system that has none


@contextmanager
def process_group(device: torch.device, minutes: float) -> "Iterator[Watchdog]":
    """Connect the processes that were started together, for the length of the block; gives a watchdog.

    Args:
        device: that of run.device; with several GPUs on a node, each process takes its own.
        minutes: how long a process waits for the others before it gives up; also for itself: see Watchdog.

    Raises:
        ValueError: if there are more processes than GPUs on this node.
        SystemExit: if another process failed, which has reported why.
        Stopped: if it was raised in the block, in all processes.
    """
    ours = launch()
    if ours.world == 1:
        with Watchdog(minutes) as watchdog:
            yield watchdog
        return
    _take_gpu(device, ours)
    timeout = timedelta(minutes=minutes)
    longer = timeout + timedelta(seconds=LATER)
    address = "env://" if ours.by == "torchrun" else f"tcp://{ours.address}:{ours.port}"
    store, _, _ = next(rendezvous(address, ours.rank, ours.world, timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    connect(backend, store, ours.rank, ours.world, longer)
    leaving = threading.Event()
    watcher = threading.Thread(target=_exit_after_a_failure, args=(store.clone(), leaving), daemon=True)
    watcher.start()
    try:
        with Watchdog(minutes, LATER / 2) as watchdog:
            yield watchdog
        _leave_together(leaving, watcher)
    except Stopped:
        _leave_together(leaving, watcher)
        raise
    except BaseException as error:
        first = _is_first_to_fail(store, error)
        _leave_after_a_failure(leaving, watcher)
        if not first and not isinstance(error, KeyboardInterrupt):
            raise SystemExit(1) from None
        if not isinstance(error, SELF_EXPLAINING) and not type(error).__module__.startswith("dinokit"):
            sys.stderr.write(f"process {ours.rank} of {ours.world}, on {socket.gethostname()}, failed:\n")
            traceback.print_exception(error)
        raise


def check_consistency(facts: Mapping[str, Any], folder: Path, key: str) -> None:
    """Check that all processes have the same `facts` and see the same folder. All processes call it.

    Args:
        facts: what must be equal in every process: a name for people, and a value.
        folder: that process 0 writes to.
        key: the setting that names the folder, for the message.

    Raises:
        ValueError: naming two processes that differ, their hosts, and in what.
    """
    if world_size() == 1:
        return
    everywhere = gather_objects({"host": socket.gethostname(), **facts})
    first = everywhere[0]
    for number, theirs in enumerate(everywhere):
        for name, value in theirs.items():
            if name != "host" and value != first[name]:
                raise ValueError(
                    f"Process {number} (on {theirs['host']}) has another {name} than process 0 (on "
                    f"{first['host']}): {value}, not {first[name]}. All processes must be given the same "
                    f"command, code and data: is the same folder mounted at the same place everywhere?"
                )
    token = broadcast(os.urandom(8).hex())
    probe = folder / f".{token}.part"
    if rank() == 0:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    gather_objects(None)
    blind = [host for host in gather_objects(None if _appears(probe) else socket.gethostname()) if host]
    if rank() == 0:
        probe.unlink()
    if blind:
        raise ValueError(
            f"{key}={folder} is not one folder for all processes: what process 0 (on {first['host']}) "
            f"writes there cannot be read on {', '.join(dict.fromkeys(blind))}. Give a folder that all nodes "
            f"share, with its full path."
        )


def digest(x: Any) -> str:
    """A short hash of a value that JSON can write; of other objects their text counts."""
    return hashlib.sha256(json.dumps(x, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _leave_together(leaving: threading.Event, watcher: threading.Thread) -> None:
    gather_objects(None)  # nobody leaves, and closes the store, while another process still works
    leaving.set()
    watcher.join()
    dist.destroy_process_group()


def _leave_after_a_failure(leaving: threading.Event, watcher: threading.Thread) -> None:
    """Exit within GRACE seconds, whatever else hangs, and with no thread left in the store.

    A thread that is in the store's C++ code when the interpreter exits makes the process abort.
    """
    last = threading.Timer(GRACE, os._exit, [1])
    last.daemon = True
    last.start()
    leaving.set()
    watcher.join(PATIENCE)


def _take_gpu(device: torch.device, ours: Launch) -> None:
    if device.type != "cuda":
        return
    if ":" in str(device):
        raise ValueError(
            f"run.device={device} is one GPU for {ours.world} processes: set run.device=cuda, and each "
            f"takes its own."
        )
    gpus = torch.cuda.device_count()
    one_each = gpus == 1 and ours.by == "SLURM"  # srun may show each task only its own
    if ours.local_world > gpus and not one_each:
        raise ValueError(
            f"{ours.local_world} processes on {socket.gethostname()}, but {gpus} GPUs: start as many "
            f"processes as GPUs."
        )
    torch.cuda.set_device(0 if one_each else ours.local_rank)


def _is_first_to_fail(store: Any, error: BaseException) -> bool:
    """Whether this process failed first. A lost connection never is: its cause gets time to be reported."""
    ours = f"{rank()}"
    try:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            error.add_note(
                "Another process is gone and reported nothing: was it killed, perhaps because memory ran "
                "out, or does it hang?"
            )
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not store.check([FAILED]):
                time.sleep(0.05)
        return store.compare_set(FAILED, "", ours).decode() == ours
    except (RuntimeError, OSError):
        # The store ended with the process that owned it, which failed before this one.
        sys.stderr.write(f"process {rank()} exits, because process 0 is gone\n")
        return False


def _exit_after_a_failure(store: Any, leaving: threading.Event) -> None:
    with suppress(RuntimeError, OSError):  # the process that owned the store may be gone
        while not leaving.wait(1.0) and not store.check([FAILED]):
            pass
    if not leaving.wait(GRACE):
        sys.stderr.flush()
        os._exit(1)


def _appears(path: Path) -> bool:
    """Whether a file can be seen here, within the seconds that a network file system may take."""
    for _ in range(20):
        if path.exists():
            return True
        time.sleep(0.25)
    return False


class Watchdog:
    """For the length of a block, a process must call reset() often enough, or it exits.

    A thread counts its own ticks, and time in which the process is suspended, as by Ctrl-Z, is one tick. The
    thread needs Python's lock. A process that hangs and holds it is ended by a clock without one, which goes
    on while the process is suspended: so it ends a process that was suspended for longer, too.

    Args:
        minutes: that a process may make no progress: `run.timeout_minutes`.
        more: seconds after that, when the clock ends the process.
    """

    def __init__(self, minutes: float, more: float = DAY) -> None:
        self.minutes, self.more = minutes, more
        self.ticks: Iterator[int] = repeat(0)  # since the last reset()
        self.closed = threading.Event()
        self.counter = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Self:
        self.counter.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.closed.set()
        self.counter.join()

    def reset(self) -> None:
        """There was progress: from now on the process has `minutes` again."""
        self.ticks = count(1)
        faulthandler.dump_traceback_later(self.minutes * 60 + self.more, exit=True, file=_stderr())

    def pause(self) -> None:
        """Wait for no progress until the next reset()."""
        self.ticks = repeat(0)
        faulthandler.cancel_dump_traceback_later()

    def _count(self) -> None:
        while not self.closed.wait(TICK):
            if next(self.ticks) * TICK >= self.minutes * 60:
                _stderr().write(
                    f"process {launch().rank} made no step for run.timeout_minutes={self.minutes:g}, and "
                    f"exits. If it is only slow, give it more minutes. It is here, thread by thread:\n"
                )
                _stderr().flush()
                faulthandler.dump_traceback(_stderr())
                os._exit(1)


def _stderr() -> IO[str]:
    return sys.__stderr__ or sys.stderr


@contextmanager
def run_lock(out: Path, key: str = "run.out") -> Iterator[None]:
    """Lock a run's folder during the block. All processes enter it; process 0 has the lock. See locked().

    Raises:
        ValueError: in all processes, if another run uses the folder.
    """
    lock = locked([(out / LOCK, False)]) if rank() == 0 else nullcontext("")
    with lock as who:
        refuse_locked(f"{key}={out}", broadcast(who))
        yield


@contextmanager
def folder_lock(out: Path, part: str = "") -> Iterator[None]:
    """Lock the folder of out= during the block, for one process. See locked().

    With `part`, such as "3-16", other parts may be written at the same time, but not this one or the whole.

    Raises:
        ValueError: if another process uses it.
    """
    locks = [(out / LOCK, bool(part)), *([(out / f"{LOCK}.{part}", False)] if part else [])]
    with locked(locks) as who:
        refuse_locked(f"out={out}", who)
        yield


def refuse_locked(place: str, who: str) -> None:
    """Raise a ValueError if `who`, as locked() gives it, is somebody."""
    if who:
        raise ValueError(
            f"{place} is in use by {printable(who)}. Two runs would spoil each other's files: wait for that "
            f"one, or end it and give the same command again, or choose another {place.partition('=')[0]}."
        )


@contextmanager
def locked(locks: Sequence[tuple[Path, bool]]) -> Iterator[str]:
    """Lock files during the block, each alone or shared. Gives who has one of them, else "".

    A requeued job may find its own lock, left by a node that died: it waits LEASE seconds for its release.
    """
    new = [path.parent for path, _ in locks[:1] if not path.parent.exists()]
    taken: list[tuple[Path, IO[str], bool]] = []
    who = ""
    try:
        for path, shared in locks:
            file, who = _take_lock(path, shared)
            if file is not None:
                taken.append((path, file, shared))
            if who:
                break
        yield who
    finally:
        for path, file, shared in reversed(taken):
            with suppress(OSError):
                if shared:  # others may still have it
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            for folder in new:
                with suppress(OSError):  # a refused run leaves no folder; others have files in it
                    folder.rmdir()
            file.close()


def _take_lock(path: Path, shared: bool) -> tuple[IO[str] | None, str]:
    """The locked file, or who has the lock; neither on a file system without locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    job = f", job {slurm_job_id()}" if slurm_job_id() else ""
    deadline = time.monotonic() + LEASE
    while True:
        file = open_own(path, "r+")
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            who = file.read() or "another process"
            file.close()
            if error.errno in NO_LOCKS:
                sys.stderr.write(f"{path.parent}: no file locks here, a second run would not be noticed\n")
                path.unlink(missing_ok=True)
                return None, ""
            if error.errno not in LOCKED:
                raise
            if not (job and who.endswith(job)) or time.monotonic() > deadline:
                return None, who
            time.sleep(1.0)
            continue
        if _is_at(file, path):
            with suppress(OSError):  # on a full disk the lock works without a name in it
                file.truncate(0)
                # Past the buffer of the file, which would be written, and fail, again when it is closed.
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}{job}".encode())
            return file, ""
        file.close()  # it was removed before we locked it


def _is_at(file: IO[str], path: Path) -> bool:
    # Not by opening the path again: closing any file of a path releases the process's lock on it.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
