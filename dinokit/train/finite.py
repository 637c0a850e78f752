"""A run ends when a loss is no number any more; it says which, when, and what to try."""

import torch
from torch import Tensor

from dinokit.train.checkpoint import Checkpoints, newest

LEAST_SCALE = 1e-3  # of fp16's gradients: it halves with every overflow


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what happened and what to try."""


def check_finite(
    table: Tensor, names: list[str], first: int, scaler: torch.amp.GradScaler, checkpoints: Checkpoints
) -> None:
    """Look at the values of some steps.

    Args:
        table: (steps, names), the same in every process.
        names: of the columns.
        first: steps done before these.
        scaler: of the run; in fp16 it answers for a gradient's overflow.
        checkpoints: of the run; one that is still being written may be the last good one.

    Raises:
        TrainingError: if one is not finite, or if in fp16 every step overflows.
    """
    bad = (~table.isfinite()).nonzero()
    scale = scaler.get_scale()
    if scale < LEAST_SCALE:
        raise TrainingError(
            f"In fp16 every step of late overflowed: the loss scale fell to {scale:g}. Take "
            f"run.precision=bf16 or fp32, in a new run.out."
        )
    skips = scaler.is_enabled()
    bad = bad[[not (skips and names[int(column)].startswith("grad_")) for _, column in bad]]
    if len(bad):
        row, column = (int(i) for i in bad[0])
        checkpoints.finish()
        last = newest(checkpoints.folder)
        raise TrainingError(
            f"'{names[column]}' became {table[row, column].item()} in step {first + row + 1}. "
            f"{f'The last good checkpoint is {last.path}.' if last else 'No checkpoint was written yet.'} "
            f"To try, one at a time, in a new run.out: a lower optim.lr, a longer optim.warmup, a "
            f"smaller optim.clip, a lower second teacher.temp, run.precision=fp32."
        )
