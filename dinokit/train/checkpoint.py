"""Save and resume a run: checkpoints/step_NNNNNNN/, complete or absent, for any number of processes.

Each process writes its shard with torch.distributed.checkpoint, as safetensors, while training continues.
Then complete.json lists every file with its length and checksum, and has one of its own, and a rename from
a hidden name makes the folder a checkpoint. So a visible folder without a readable complete.json is damaged,
and is named, never passed over. Nothing in a checkpoint is code.

A tensor is called model.NAME if it is a parameter or buffer, and optimizer.KEY.NAME if it is AdamW's KEY
(exp_avg, exp_avg_sq, step) of the parameter NAME. A parameter that was not stepped yet, such as a frozen
prototype, has no entry there.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from dinokit.runtime.distributed import (
    broadcast,
    gather_objects,
    group,
    local,
    new_cpu_group,
    rank,
    world_size,
)
from dinokit.runtime.files import (
    DiskFullError,
    atomic,
    full_disk,
    read_regular,
    remove,
    sha256_of,
    sync_folder,
)

MARK = "complete.json"
PATTERN = "step_*"
ONCE = ".checkpointed"  # in the run's folder, once it has had a checkpoint
MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass
class SavedCheckpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    values: dict[str, Any]  # everything that is not a tensor
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
        # As they are now: a writing thread may outlive the block in which these processes work together.
        self.rank, self.world = rank(), world_size()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        _no_warning_of_one_process()
        # A group of its own: messages of the writing threads must not mix with those of the step.
        self.group: Any = new_cpu_group() if self.world > 1 else None

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy the state after `step` steps, and write the copy in the background.

        Raises:
            OSError: if the checkpoint before could not be written, such as on a full disk; those before that
                are untouched.
        """
        self.finish()
        copy: Any = DefaultStager(StagingOptions(False, False, False, False)).stage(dict(tensors))
        self.writing = self.thread.submit(self._write, step, copy, dict(values))

    def raise_failure(self) -> None:
        """Raise the error of the last write, if it has failed.

        Raises:
            OSError: as save().
        """
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: as save().
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def failure(self, step: int, error: BaseException) -> str:
        """The message if a file of a checkpoint cannot be written."""
        last = last_good(self.folder)
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}. "
            f"{f'The last good one is {last}.' if last else 'There is none yet.'} Make room (or copy "
            f"the folder to another disk and set run.out to it), then give the same command again."
        )

    def remove_after(self, step: int) -> None:
        """Remove checkpoints of more than `step` steps, from which the run did not resume."""
        if self.rank == 0:
            for path in self.folder.glob(PATTERN):
                if _step(path) > step:
                    remove(path)

    def __enter__(self) -> "Checkpoints":
        if self.rank == 0:
            self._remove_old()  # which a process that was killed had no time for
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; not after an error among several, for some may be gone."""
        if kind is None:
            self.finish()
        self.thread.shutdown(wait=self.world == 1)

    def _write(self, step: int, tensors: dict[str, Any], values: dict[str, Any]) -> None:
        path = self.folder / f"step_{step:07d}"
        temporary = self.folder / f".{path.name}.part"
        try:
            if self.rank == 0:
                remove(temporary)
                temporary.mkdir(parents=True)
            self._gather(None)  # nobody writes before the folder is there
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            single = self.group is None
            state_dict_saver.save(tensors, storage_writer=writer, process_group=self.group, no_dist=single)
            # Each process lists the file that it wrote; the number in its name is the rank, from 1.
            entries = [_entry(p) for p in sorted(temporary.glob(f"shard-{self.rank + 1:05d}-*"))]
            files = {name: entry for each in self._gather(entries) for name, entry in each}
            if self.rank == 0:
                self._complete(temporary, path, {"step": step, "values": values, "files": files})
            self._gather(None)
        except (OSError, RuntimeError, CheckpointException) as error:
            full = full_disk(_cause(error), path, temporary)
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(self.failure(step, full or error)) from None

    def _complete(self, temporary: Path, path: Path, content: dict[str, Any]) -> None:
        with atomic(temporary / MARK) as mark:
            text = json.dumps({"sha256": _sha256_of(content), **content}, indent=1)
            mark.write_text(text, encoding="utf-8")
        remove(path)  # the same step again, after the run resumed from an older checkpoint
        temporary.rename(path)
        (self.folder.parent / ONCE).touch()
        sync_folder(self.folder)
        self._remove_old()

    def _remove_old(self) -> None:
        complete = sorted((p for p in self.folder.glob(PATTERN) if (p / MARK).exists()), key=_step)
        for old in complete[: -self.keep]:
            if not self.keep_every or _step(old) % self.keep_every:
                remove(old)

    def _gather(self, x: Any) -> list[Any]:
        if self.group is None:
            return [x]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, x, group=self.group)
        return gathered


def readable(folder: Path) -> list[SavedCheckpoint]:
    """All checkpoints of a run, the newest first, without those whose complete.json cannot be read."""
    return list(_found(folder, skip_damaged=True))


def newest(folder: Path) -> SavedCheckpoint | None:
    """The newest checkpoint of a run, or None if it has none.

    Raises:
        ValueError: if it is damaged so that complete.json cannot be read; the message says how to go on.
    """
    return next(_found(folder), None)


def latest(folder: Path) -> SavedCheckpoint | None:
    """newest(), read by process 0 and sent to every process."""
    return broadcast(newest(folder) if rank() == 0 else None)


def before(folder: Path, step: int) -> SavedCheckpoint | None:
    """The newest checkpoint of fewer than `step` steps, as latest(). Raises as newest()."""
    earlier = (saved for saved in _found(folder) if saved.step < step)
    return broadcast(next(earlier, None) if rank() == 0 else None)


def last_good(folder: Path) -> Path | None:
    """The path of the newest checkpoint, for a message; None if there is none, or if it is damaged."""
    try:
        found = newest(folder)
    except ValueError:
        return None
    return found.path if found else None


def to_resume(out: Path, resume: str) -> SavedCheckpoint | None:
    """The checkpoint that the run in folder `out` resumes from, in every process; None to begin at step 0.

    Raises:
        ValueError: if there is none: with resume=must; and with resume=auto, if the run had one before.
    """
    saved = None if resume == "never" else latest(out / "checkpoints")
    lost = saved is None and resume == "auto" and (out / ONCE).exists()
    if lost or (saved is None and resume == "must"):
        why = "The run had one: copy it back. " if lost else ""
        raise ValueError(
            f"{out / 'checkpoints'} has no checkpoint to resume from. {why}To begin at step 0 and overwrite "
            f"the records in {out}, set run.resume=never; to keep them, choose another run.out."
        )
    return saved


def _found(folder: Path, skip_damaged: bool = False) -> Iterator[SavedCheckpoint]:
    """The checkpoints of a run, the newest first. Raises as newest(), unless it skips what is damaged."""
    for path in sorted(folder.glob(PATTERN), key=_step, reverse=True):
        try:
            yield _read_mark(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if skip_damaged or not path.exists():
                continue  # or it was old, and was removed meanwhile
            reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
            raise ValueError(
                f"{path} is damaged: {MARK} in it cannot be read: {reason}. Copy it back, or move the folder "
                f"away, and the run resumes from the checkpoint before it."
            ) from None


def _read_mark(path: Path) -> SavedCheckpoint:
    content = json.loads(read_regular(path / MARK))
    written = content.pop("sha256", None)
    step, values, files = int(content["step"]), dict(content["values"]), dict(content["files"])
    old = written is None and content.keys() == {"step", "values", "files"}  # of an earlier version
    if step != _step(path) or not (old or written == _sha256_of(content)):
        raise ValueError("it does not match its checksum and its folder's name")
    return SavedCheckpoint(path, step, values, files)


def verify(saved: SavedCheckpoint) -> None:
    """Compare every file with its checksum, each in one process. Call it before reading.

    Raises:
        ValueError: if one is damaged; the message says how to resume without it.
    """
    present = {path.name for path in saved.path.iterdir()} - {MARK}  # others would be read with them
    mine = sorted(present | set(saved.files))[rank() :: world_size()]
    wrong = [text for texts in gather_objects([_damage(saved, n) for n in mine]) for text in texts if text]
    if wrong:
        raise ValueError(
            f"{saved.path} is damaged: {'; '.join(wrong)}. Move it away, and the run resumes from the "
            f"checkpoint before it."
        )


def load(saved: SavedCheckpoint, targets: Mapping[str, Tensor]) -> None:
    """Read a checkpoint into `targets`, by name; they may be sharded in another way than when saved.

    Raises:
        ValueError: if it cannot be read.
    """
    _no_warning_of_one_process()
    try:
        reader = HuggingFaceStorageReader(str(saved.path))
        single = world_size() == 1
        state_dict_loader.load(dict(targets), storage_reader=reader, process_group=group(), no_dist=single)
    except CheckpointException as error:
        raise ValueError(f"{saved.path} cannot be read: {_reason(error)}.") from None


def shapes(saved: SavedCheckpoint) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in a checkpoint."""
    stored = HuggingFaceStorageReader(str(saved.path)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in stored.items() if hasattr(entry, "size")}


def named_tensors(model: nn.Module, trained: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the model, and of the optimiser of `trained`, which is a part of the model."""
    tensors = {f"{MODEL}{name}": x for name, x in model.state_dict().items()}
    for name, p in trained.named_parameters():
        tensors |= {f"{OPTIMIZER}{key}.{name}": x for key, x in optimizer.state.get(p, {}).items()}
    return tensors


def read_targets(
    stored: Mapping[str, tuple[int, ...]], model: nn.Module, trained: nn.Module
) -> dict[str, Tensor]:
    """Tensors to read a checkpoint with these names and shapes into; then give them to restore().

    Raises:
        ValueError: if it does not fit the model.
    """
    present, parameters = model.state_dict(), dict(trained.named_parameters())
    absent = [name for name in present if f"{MODEL}{name}" not in stored]
    targets: dict[str, Tensor] = {}
    for key, shape in stored.items():
        if key.startswith(MODEL):
            x = present.get(key.removeprefix(MODEL))
            targets[key] = x if x is not None and tuple(x.shape) == shape else torch.zeros(shape)
            absent += [key] if x is None else []
        else:
            p = parameters.get(key.removeprefix(OPTIMIZER).split(".", 1)[1])
            absent += [key] if p is None else []
            if p is not None:
                targets[key] = torch.zeros_like(p) if tuple(p.shape) == shape else torch.zeros(shape)
    if absent:
        raise ValueError(
            f"The checkpoint was written for another model, or by another version of dinokit: "
            f"{', '.join(absent[:5])} {'is' if len(absent) == 1 else 'are'} on one side only."
        )
    return targets


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor], model: nn.Module, trained: nn.Module, optimizer: Optimizer
) -> None:
    """Put tensors that were read from a checkpoint into model and optimiser."""
    model.load_state_dict({k.removeprefix(MODEL): x for k, x in tensors.items() if k.startswith(MODEL)})
    parameters = dict(trained.named_parameters())
    for name, x in tensors.items():
        if name.startswith(OPTIMIZER):
            key, _, parameter = name.removeprefix(OPTIMIZER).partition(".")
            p = parameters[parameter]
            optimizer.state[p][key] = x.to(local(p).device)


def _no_warning_of_one_process() -> None:
    # It comes at every save and load; and in a thread, filters cannot be set temporarily.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _damage(saved: SavedCheckpoint, name: str) -> str:
    if name not in saved.files:
        return f"{name} does not belong to it"
    path, entry = saved.path / name, saved.files[name]
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size} bytes, not {entry['bytes']}"
    return "" if sha256_of(path) == entry["sha256"] else f"{name} does not match its checksum"


def _entry(path: Path) -> tuple[str, dict[str, Any]]:
    return path.name, {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def _cause(error: BaseException) -> BaseException:
    """The error of one process, out of torch's report on all."""
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
        return next((c for c in causes if isinstance(c, OSError)), causes[0] if causes else error)
    return error


def _reason(error: BaseException) -> str:
    error = _cause(error)
    if isinstance(error, DiskFullError):
        return error.fact
    return str(error).strip().rstrip(".") or type(error).__name__
