"""One run at a time in a folder: a second one is refused, and is told who is there.

The lock is the kernel's, on the file run.out/.lock: it ends with the process that holds it, however that one
ends, and processes that it forked do not have it. On a file system that nodes share it holds between nodes.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dinokit.runtime.distributed import broadcast, rank, slurm_job_id

LOCK = ".lock"  # in the run's folder, while the run is at work
LEASE = 120.0  # seconds; a file server gives up the locks of a machine that is gone after 90 or so (NFS 4)
HELD = errno.EACCES, errno.EAGAIN  # errors of a lock that another process has
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # errors of a file system that has none


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Have a run's folder, for the length of the block. All processes enter it, and process 0 holds it.

    A job that starts again may find its own lock, left by a node that died: it waits LEASE seconds for it.

    Raises:
        ValueError: in all processes, if another run is at work there.
    """
    made = not out.exists()
    file, who = _take(out / LOCK) if rank() == 0 else (None, "")
    try:
        if who := broadcast(who):
            raise ValueError(
                f"run.out={out} is in use by {who}. Two runs would spoil each other's files: wait for that "
                f"one, or end it and give the same command again, or choose another run.out."
            )
        yield
    finally:
        if file is not None:
            (out / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # a run that was refused leaves no folder; one that began has files in it
                if made:
                    out.rmdir()
            file.close()


def _take(path: Path) -> tuple[IO[str] | None, str]:
    """The locked file, or who holds it. Neither, where the file system has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    job = f", job {slurm_job_id()}" if slurm_job_id() else ""
    deadline = time.monotonic() + LEASE
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            who = file.read() or "another process"
            file.close()
            if error.errno in NO_LOCKS:
                sys.stderr.write(f"{path.parent}: no file locks here, a second run would not be noticed\n")
                path.unlink(missing_ok=True)
                return None, ""
            if error.errno not in HELD:
                raise
            if not (job and who.endswith(job)) or time.monotonic() > deadline:
                return None, who
            time.sleep(1.0)
            continue
        if _is_at(file, path):
            with suppress(OSError):  # a full disk: the lock holds without a name in it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
                file.flush()
            return file, ""
        file.close()  # its holder removed it before we had it


def _is_at(file: IO[str], path: Path) -> bool:
    # Not by opening it once more: closing any file of a path gives up the process's lock on it.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
