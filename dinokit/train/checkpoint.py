"""Save and resume a run: checkpoints/step_NNNNNNN/, whole or not there, for any number of processes.

Each process writes its part by torch.distributed.checkpoint, as safetensors, while training goes on;
complete.json then lists every file with its length and checksum, and a move from a hidden name makes the
folder a checkpoint. Nothing in it can be run.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dinokit.runtime.distributed import broadcast, gather_objects, rank, world_size
from dinokit.runtime.files import atomic, remove, sync_folder

MARK = "complete.json"
PATTERN = "step_*"


@dataclass
class Found:
    """A checkpoint that was written to its end."""

    path: Path
    step: int
    values: dict[str, Any]  # all that is no tensor
    files: dict[str, dict[str, Any]]  # by name: bytes, sha256


class Checkpoints:
    """The checkpoints of a run, to be used in a `with` block; all processes call each method.

    Args:
        folder: of the run's checkpoints.
        keep: the newest so many stay.
        keep_every: so do those of every so many steps; 0: none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        _no_warning_of_one_process()
        # A group of its own: what the thread says to its like must not mix with what the step says.
        self.group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy the state after `step` steps, and write the copy while the caller goes on.

        Raises:
            OSError: if the checkpoint before could not be written, such as on a full disk; those before that
                are untouched.
        """
        self.finish()
        copy: Any = DefaultStager(StagingOptions(False, False, False, False)).stage(dict(tensors))
        self.writing = self.thread.submit(self._write, step, copy, dict(values))

    def check(self) -> None:
        """Raise what went wrong with a write that is over, if anything did.

        Raises:
            OSError: as save().
        """
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved is written.

        Raises:
            OSError: as save().
        """
        done, self.writing = self.writing, None
        if done is not None:
            done.result()

    def trouble(self, step: int, error: BaseException) -> str:
        """What to say when what belongs to a checkpoint cannot be written."""
        last = newest(self.folder)
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}. "
            f"{f'The last good one is {last.path}.' if last else 'There is none yet.'} Make room (or copy "
            f"the folder to another disk and set run.out to it), then give the same command again."
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; not after an error among several, for some may be gone."""
        if kind is None:
            self.finish()
        self.thread.shutdown(wait=world_size() == 1)

    def _write(self, step: int, tensors: dict[str, Any], values: dict[str, Any]) -> None:
        path = self.folder / f"step_{step:07d}"
        part = self.folder / f".{path.name}.part"
        try:
            if rank() == 0:
                remove(part)
                part.mkdir(parents=True)
            self._gather(None)  # nobody writes before the folder is there
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
            alone = self.group is None
            state_dict_saver.save(tensors, storage_writer=writer, process_group=self.group, no_dist=alone)
            # Each process sees to the file that it wrote; its number in the name is the rank's, from 1.
            own = [_entry(p) for p in sorted(part.glob(f"shard-{rank() + 1:05d}-*"))]
            files = {name: entry for each in self._gather(own) for name, entry in each}
            if rank() == 0:
                self._complete(part, path, {"step": step, "values": values, "files": files})
            self._gather(None)
        except (OSError, RuntimeError, CheckpointException) as error:
            if rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(self.trouble(step, error)) from None

    def _complete(self, part: Path, path: Path, content: dict[str, Any]) -> None:
        with atomic(part / MARK) as mark:
            mark.write_text(json.dumps(content, indent=1), encoding="utf-8")
        remove(path)  # the same step again, after a run went back to an older checkpoint
        part.rename(path)
        sync_folder(self.folder)
        whole = sorted((p for p in self.folder.glob(PATTERN) if (p / MARK).exists()), key=_step)
        for old in whole[: -self.keep]:
            if not self.keep_every or _step(old) % self.keep_every:
                remove(old)

    def _gather(self, x: Any) -> list[Any]:
        if self.group is None:
            return [x]
        found: list[Any] = [None] * world_size()
        dist.all_gather_object(found, x, group=self.group)
        return found


def newest(folder: Path) -> Found | None:
    """The newest checkpoint of a run, if it has one. What was not written to its end is none."""
    for path in sorted(folder.glob(PATTERN), key=_step, reverse=True):
        try:
            content = json.loads((path / MARK).read_text(encoding="utf-8"))
            return Found(path, int(content["step"]), dict(content["values"]), dict(content["files"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def latest(folder: Path) -> Found | None:
    """newest() as process 0 sees it, in every process."""
    return broadcast(newest(folder) if rank() == 0 else None)


def verify(found: Found) -> None:
    """Compare every file with its checksum, each in one process. Comes before all reading.

    Raises:
        ValueError: if one is damaged; it says how to go on without it.
    """
    mine = sorted(found.files)[rank() :: world_size()]
    wrong = [text for texts in gather_objects([_damage(found, n) for n in mine]) for text in texts if text]
    if wrong:
        raise ValueError(
            f"{found.path} is damaged: {'; '.join(wrong)}. Move it away, and the run goes on from the "
            f"checkpoint before."
        )


def load(found: Found, targets: Mapping[str, Tensor]) -> None:
    """Read a checkpoint into `targets`, by name; they may be cut otherwise than what was saved.

    Raises:
        ValueError: if that cannot be.
    """
    _no_warning_of_one_process()
    try:
        reader = HuggingFaceStorageReader(str(found.path))
        state_dict_loader.load(dict(targets), storage_reader=reader, no_dist=world_size() == 1)
    except CheckpointException as error:
        raise ValueError(f"{found.path} cannot be read: {_reason(error)}.") from None


def shapes(found: Found) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in a checkpoint."""
    stored = HuggingFaceStorageReader(str(found.path)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in stored.items() if hasattr(entry, "size")}


def _no_warning_of_one_process() -> None:
    # Said at every save and load; and in a thread, filters cannot be set for a moment.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _damage(found: Found, name: str) -> str:
    path, entry = found.path / name, found.files[name]
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size} bytes, not {entry['bytes']}"
    return "" if _sha256(path) == entry["sha256"] else f"{name} does not match its checksum"


def _entry(path: Path) -> tuple[str, dict[str, Any]]:
    return path.name, {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def _reason(error: BaseException) -> str:
    """What one process met, out of torch's report on all."""
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
        error = next((c for c in causes if isinstance(c, OSError)), causes[0] if causes else error)
    return str(error).strip().rstrip(".") or type(error).__name__
