"""The state of an evaluator that trains for long: kept while it does, so that the same command goes on."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dinokit.features import fingerprint
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_max, rank
from dinokit.runtime.files import atomic
from dinokit.runtime.signals import Stopped

# Settings that change nothing that is learnt.
FREE = ("cache", "out", "save_every", "workers", "test", "max_test", "max_unreadable")


def identity(values: Mapping[str, Any], backbone: Backbone) -> str:
    """What a training is: its settings, but for those that change nothing that is learnt, and the weights."""
    kept = {key: value for key, value in values.items() if key not in FREE}
    return json.dumps({**kept, "weights": fingerprint(backbone, settings=True)}, sort_keys=True, default=list)


class Resume:
    """One file in `folder`, or none if that is none.

    Args:
        folder: where to keep it.
        name: of the evaluator.
        depends_on: all that decides what is trained; its repr() says it all. Another leaves this state alone.
        device: where the state goes.
    """

    def __init__(self, folder: str | None, name: str, depends_on: object, device: torch.device) -> None:
        tag = blake2b(repr(depends_on).encode(), digest_size=6).hexdigest()
        self.path = Path(folder).expanduser() / f".{name}_{tag}.pt" if folder else None
        self.device = device

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; none if there is none that every process can read."""
        state = None
        try:
            if self.path is not None and self.path.is_file():
                state = torch.load(self.path, map_location=self.device, weights_only=True)
        except Exception:  # damaged, each in its own way: then there is nothing to go on from
            state = None
        absent = torch.tensor(int(state is None), device=self.device)
        return None if int(all_reduce_max(absent)) else state

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep this one; process 0 writes it.

        Raises:
            OSError: if it cannot be written.
        """
        if self.path is not None and rank() == 0:
            with atomic(self.path) as part:
                torch.save(dict(state), part)

    @contextmanager
    def kept(self, state: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Save the state when the block ends or is told to stop; an error may come amid a step.

        Raises:
            OSError: as `save`.
        """
        try:
            yield
        except Stopped:
            self.save(state())
            raise
        self.save(state())

    def finish(self) -> None:
        """Remove it."""
        if self.path is not None and rank() == 0:
            self.path.unlink(missing_ok=True)
