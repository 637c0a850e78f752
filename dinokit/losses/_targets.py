"""What the teacher asks of the student: logits (R, K) to probabilities, balanced by the batch or a centre.

R  rows on this process      K  prototypes
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dinokit.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Probabilities (R, K) that use every prototype equally often; each row sums to 1.

    The iteration of SwAV (Caron et al., arXiv 2006.09882) as DINOv2 runs it: in turn, every prototype gets
    the same mass over the rows of all processes, then every row mass 1. It is computed on logarithms. Each
    prototype's largest logit is taken off first, which the first normalisation cancels; so nothing overflows,
    whatever the logits, and no prototype's sum underflows.

    Args:
        logits: (R, K), in any floating type; R may be 0 on some processes.
        temp: of the teacher.
        iterations: of both normalisations.
    """
    x = logits.float() / temp
    x = x - all_reduce_max(torch.cat([x, x.new_full((1, x.shape[1]), -torch.inf)]).amax(dim=0))
    for _ in range(iterations):
        x -= all_reduce_sum(x.exp().sum(dim=0)).log()
        x -= x.logsumexp(dim=1, keepdim=True)
    return x.exp_()


class Sinkhorn(nn.Module):
    """sinkhorn_knopp() as targets; keeps nothing."""

    def forward(self, logits: Tensor, temp: float, new_step: bool) -> Tensor:
        """(R, K) logits -> (R, K) probabilities."""
        return sinkhorn_knopp(logits, temp)


class Centering(nn.Module):
    """softmax((logits - centre) / temp); the centre is a moving average of the logits (DINO, section 3.1).

    The logits are the teacher's. The targets of a step use the centre of the steps before it. What a step
    adds is summed over its parts and over all processes, row by row, and joins the centre when the next step
    begins.
    """

    center: Tensor
    pending: Tensor
    rows: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1))  # (K,) from the first batch on
        self.register_buffer("pending", torch.zeros(1))
        self.register_buffer("rows", torch.zeros(()))
        self.register_load_state_dict_pre_hook(_take_shapes)
        # What is saved must be the same in every process. All ask for it, so all sum; and to fold a little
        # earlier changes nothing.
        self.register_state_dict_pre_hook(lambda module, *_: module.fold())

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float, new_step: bool) -> Tensor:
        """(R, K) logits -> (R, K) probabilities."""
        if new_step:
            self.fold()
        x = logits.float()
        self.pending = self.pending + x.sum(dim=0)
        self.rows += len(x)
        return ((x - self.center) / temp).softmax(dim=1)

    @torch.no_grad()
    def fold(self) -> None:
        """Let the rows seen since the last call move the centre; without any, leave it."""
        total, rows = all_reduce_sum(self.pending.clone()), all_reduce_sum(self.rows.clone())
        moved = torch.lerp(total / rows.clamp(min=1), self.center, self.momentum)
        self.center = torch.where(rows > 0, moved, self.center)
        self.pending = torch.zeros_like(self.pending)
        self.rows = torch.zeros_like(self.rows)


def build_targets(kind: Literal["sinkhorn", "centering"], momentum: float) -> nn.Module:
    """The module behind `losses.*.targets`."""
    return Sinkhorn() if kind == "sinkhorn" else Centering(momentum)


def _take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    # A loss is built before K is known; what is loaded knows it.
    for name, buffer in list(module.named_buffers(recurse=False)):
        if prefix + name in state:
            module.register_buffer(name, buffer.new_zeros(state[prefix + name].shape))
