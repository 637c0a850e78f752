"""Save and resume a run: checkpoints/step_NNNNNNN.pt, whole or not there; reading one runs no code in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dinokit.files import atomic

PATTERN = "step_*.pt"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep` checkpoints.

    Raises:
        OSError: if it cannot be written, such as on a full disk; earlier checkpoints are then untouched.
    """
    path = folder / f"step_{step:07d}.pt"
    try:
        with atomic(path) as part:
            torch.save({"step": step, **state}, part)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        last = latest(folder)
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder}: {error}. "
            f"{f'The last good one is {last}.' if last else 'There is none yet.'} Make room (or set run.out "
            f"to another disk and copy the folder), then give the same command again."
        ) from None
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    return max(folder.glob(PATTERN), default=None)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is executed.

    Raises:
        ValueError: if it is broken; it says how to go on without it.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a broken zip, a foreign pickle, a short read: each has its own type
        raise ValueError(
            f"{path} cannot be read ({error}). Move it away, and the run goes on from the checkpoint before."
        ) from None
