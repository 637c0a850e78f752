"""State of unfinished work on disk, so that the same command resumes it after a stop or a crash.

Every long computation (feature extraction, evaluators, lists of evaluations, curation stages) saves its state
through PartialResult; a training run has checkpoints of its own (train/checkpoint.py). The cache of features
(features/extract.py) keeps results in the same form.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from dinokit.runtime.distributed import all_reduce_max, rank, world_size
from dinokit.runtime.files import DiskFullError, atomic
from dinokit.runtime.signals import Stopped


class PartialResult:
    """The saved state of one piece of work, in a folder.

    save() replaces one state, which process 0 writes and all read. For results that are too large to write
    again each time, append() adds pieces, and each process reads back its own.

    Args:
        folder: of the file; None: nothing is saved.
        name: of the work, for people who look into the folder.
        depends_on: everything that decides the result; its repr() is hashed into the file's name, so that
            other settings, weights or images never resume from this state.
        device: where loaded tensors go.
        advice: what the user can do if the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path | None,
        name: str,
        depends_on: object,
        device: torch.device | None = None,
        advice: str = "Free some space, or set out=ANOTHER_FOLDER.",
    ) -> None:
        tag = blake2b(repr(depends_on).encode(), digest_size=8).hexdigest()
        self.path = Path(folder).expanduser() / f".{name}_{tag}.pt" if folder is not None else None
        self.device, self.advice = device or torch.device("cpu"), advice
        self._pieces = 0

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or None if some process cannot read one. All processes call it."""
        state = None if self.path is None else self._read(self.path)
        missing = torch.tensor(int(state is None), device=self.device)
        return None if int(all_reduce_max(missing)) else state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        if self.path is not None and rank() == 0:
            self._write(self.path, state)

    def append(self, piece: Mapping[str, Any]) -> None:
        """Save one more piece of this process's work; earlier pieces stay as they are.

        Raises:
            OSError: if the file cannot be written.
        """
        if self.path is not None:
            self._write(self._piece(self.path), piece)
            self._pieces += 1

    def load_pieces(self) -> Iterator[dict[str, Any]]:
        """The pieces of this process in order, up to the first damaged one; append() continues after them.

        Pieces that another number of processes saved are ignored.
        """
        while self.path is not None and (piece := self._read(self._piece(self.path))) is not None:
            yield piece
            self._pieces += 1

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
            for path in (self.path, *self.path.parent.glob(f"{self.path.stem}.*.pt")):
                path.unlink(missing_ok=True)

    def _piece(self, path: Path) -> Path:
        return path.with_name(f"{path.stem}.{rank()}of{world_size()}.{self._pieces}.pt")

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            with ZipFile(path) as file:
                if file.testzip() is not None:  # torch.load checks no checksum
                    return None
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        except Exception:  # a missing or damaged file fails in many ways; each means to compute it again
            return None
        return state

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            with atomic(path) as temporary, temporary.open("wb") as file:
                torch.save(dict(state), file)
        except (OSError, RuntimeError) as error:
            why = error.fact if isinstance(error, DiskFullError) else error
            raise OSError(f"Results could not be saved in {path.parent}: {why}. {self.advice}") from None
