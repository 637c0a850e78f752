"""Lock of a run's folder: a second run in the same folder is refused with the name of the first.

It is a kernel lock on the file run.out/.lock: it is released when the process that has it ends, and forked
processes do not have it. It works between nodes on a shared file system.
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

LOCK = ".lock"  # in the run's folder during the run
LEASE = 120.0  # seconds; a file server releases the locks of a lost machine after about 90 (NFS 4)
LOCKED = errno.EACCES, errno.EAGAIN  # errors of a lock that another process has
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # errors of a file system that has none


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Lock a run's folder during the block. All processes enter it; process 0 has the lock.

    A requeued job may find its own lock, left by a node that died: it waits LEASE seconds for its release.

    Raises:
        ValueError: in all processes, if another run uses the folder.
    """
    is_new = not out.exists()
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
            with suppress(OSError):  # a refused run leaves no folder; others have files in it
                if is_new:
                    out.rmdir()
            file.close()


def _take(path: Path) -> tuple[IO[str] | None, str]:
    """The locked file, or who has the lock; neither on a file system without locks."""
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
            if error.errno not in LOCKED:
                raise
            if not (job and who.endswith(job)) or time.monotonic() > deadline:
                return None, who
            time.sleep(1.0)
            continue
        if _is_at(file, path):
            with suppress(OSError):  # on a full disk the lock works without a name in it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
                file.flush()
            return file, ""
        file.close()  # it was removed before we locked it


def _is_at(file: IO[str], path: Path) -> bool:
    # Not by opening the path again: closing any file of a path releases the process's lock on it.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
