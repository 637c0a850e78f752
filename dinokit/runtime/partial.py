"""State of unfinished work on disk, so that the same command resumes it after a stop or a crash.

Every long computation (feature extraction, evaluators, lists of evaluations, curation stages) saves its state
through PartialResult; a training run has checkpoints of its own (train/checkpoint.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dinokit.runtime.distributed import all_reduce_max, rank
from dinokit.runtime.files import atomic
from dinokit.runtime.signals import Stopped


class PartialResult:
    """One state file in a folder; with several processes, process 0 writes it and all read it.

    Args:
        folder: where the file is kept; None keeps nothing.
        name: of the work, for people who look into the folder.
        depends_on: everything that decides the result; its repr() is hashed into the file's name, so that
            other settings, weights or images never resume from this state.
        device: where loaded tensors go.
    """

    def __init__(
        self, folder: str | Path | None, name: str, depends_on: object, device: torch.device | None = None
    ) -> None:
        tag = blake2b(repr(depends_on).encode(), digest_size=8).hexdigest()
        self.path = Path(folder).expanduser() / f".{name}_{tag}.pt" if folder is not None else None
        self.device = device or torch.device("cpu")

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or None if some process cannot read one. All processes call it."""
        state = None
        try:
            if self.path is not None and self.path.is_file():
                state = torch.load(self.path, map_location=self.device, weights_only=True)
        except Exception:  # a damaged file fails in many ways; each means that the work starts again
            state = None
        missing = torch.tensor(int(state is None), device=self.device)
        return None if int(all_reduce_max(missing)) else state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        if self.path is not None and rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.path) as part:
                torch.save(dict(state), part)

    @contextmanager
    def saved_on_exit(self, state: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Save `state()` when the block ends, or when a stop signal ends it; an error may leave half a step.

        Raises:
            OSError: as save().
        """
        try:
            yield
        except Stopped:
            self.save(state())
            raise
        self.save(state())

    def remove(self) -> None:
        """Delete the state: the work is complete."""
        if self.path is not None and rank() == 0:
            self.path.unlink(missing_ok=True)
