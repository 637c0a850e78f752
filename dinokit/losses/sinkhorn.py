"""Teacher targets by Sinkhorn-Knopp: every prototype is used equally often by the batch.

Caron et al. 2020 (SwAV, arXiv 2006.09882), as DINOv2 (arXiv 2304.07193) applies it to the teacher.

    R  rows on this process      K  prototypes
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dinokit.runtime.distributed import all_reduce_max, all_reduce_sum

if TYPE_CHECKING:
    from dinokit.losses import HeadName, Views
    from dinokit.losses.chunked import SlicedTargets


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Logits (R, K) to probabilities (R, K) float32. The batch is the rows of all processes.

    In turn, every column is scaled to the same sum over the batch, then every row to the sum 1. The iteration
    runs on logarithms, so logits of any size neither overflow nor vanish.
    """
    log_q = logits.float() / temperature
    for _ in range(iterations):
        log_q = log_q - _column_logsumexp(log_q)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def _column_logsumexp(x: Tensor) -> Tensor:
    """Logsumexp of each column of x (R, K) over the rows of all processes: (K,). R may be 0 on some."""
    own = x.logsumexp(dim=0)
    peak = all_reduce_max(own.clone())
    return peak + all_reduce_sum((own - peak).exp()).log()


class Sinkhorn(nn.Module):
    """sinkhorn_knopp() as the targets of a loss on the logits of one head. It has no state."""

    def __init__(self, head: "HeadName") -> None:
        super().__init__()
        self.head = head

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Teacher logits (..., K) to probabilities (..., K)."""
        return sinkhorn_knopp(logits.flatten(0, -2), temperature).view(logits.shape)

    def in_slices(self, views: "Views", head: "HeadName") -> "SlicedTargets":
        """The same for the teacher's logits of one head, in slices (losses/chunked.py)."""
        return views.balanced_targets(head)
