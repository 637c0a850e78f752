"""Teacher targets by a softmax of logits minus their moving average, the centre.

Caron et al. 2021 (DINO, arXiv 2104.14294), section 3.1.

R  rows on this process      K  prototypes
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dinokit.losses import chunked
from dinokit.runtime.distributed import all_reduce_sum

if TYPE_CHECKING:
    from dinokit.losses import HeadName, Views


def centered_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature): logits (..., K) and a centre (K,) to (..., K)."""
    return ((logits.float() - center) / temperature).softmax(dim=-1)


class Centering(nn.Module):
    """centered_softmax() as the targets of a loss, with its moving average of the teacher's logits.

    The targets of a step use the centre of the steps before it. A step may consist of several micro-batches
    on several processes: their rows are summed up, and end_of_step() moves the centre by their mean.

    Args:
        prototypes: K.
        momentum: of the moving average.
    """

    center: Tensor
    pending: Tensor
    rows: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("pending", torch.zeros(prototypes))  # the sum of this step's rows
        self.register_buffer("rows", torch.zeros(()))  # their number; both are 0 between steps

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Teacher logits (..., K) to probabilities (..., K)."""
        rows = logits.flatten(0, -2).float()
        self.pending += rows.sum(dim=0)
        self.rows += len(rows)
        return centered_softmax(logits, self.center, temperature)

    @torch.no_grad()
    def in_slices(self, views: "Views", head: "HeadName") -> chunked.SlicedTargets:
        """The same for the teacher's logits of one head, in slices (losses/chunked.py)."""
        targets, total = chunked.centered_softmax(
            views.teacher(head), self.center, views.teacher_temp, views.slices(head)
        )
        self.pending += total
        self.rows += len(targets.slices[0])
        return targets

    @torch.no_grad()
    def end_of_step(self) -> None:
        """Move the centre by this step's rows of all processes. A step without rows leaves it as it is."""
        total, rows = all_reduce_sum(self.pending.clone()), all_reduce_sum(self.rows.clone())
        moved = torch.lerp(total / rows.clamp(min=1), self.center, self.momentum)
        self.center.copy_(torch.where(rows > 0, moved, self.center))
        self.pending.zero_()
        self.rows.zero_()
