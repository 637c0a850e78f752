"""What the teacher asks of the student: scores of R rows to probabilities, balanced by the batch or a centre.

R  rows on this process      K  prototypes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dinokit.distributed import all_reduce_max, all_reduce_sum
from dinokit.layers.head import CPU_CHUNK, Scores

if TYPE_CHECKING:
    from dinokit.losses import Views

Which = Literal["cls", "patch"]  # the class token's head, or that of the patches


@dataclass
class Targets:
    """Probabilities: mass, times a factor a row, times a factor a column. They cost one exponential each."""

    mass: Tensor  # (R, K) float32
    row: Tensor  # (R,)
    column: Tensor  # (K,)

    def probabilities(self) -> Tensor:
        """(R, K), each row sums to 1."""
        return self.mass * self.row[:, None] * self.column


@torch.no_grad()
def sinkhorn_knopp(scores: Sequence[Scores], temp: float, iterations: int = 3) -> list[Targets]:
    """Probabilities that use every prototype equally often, for one head or several.

    The iteration of SwAV (Caron et al., arXiv 2006.09882) as DINOv2 runs it: in turn, every prototype gets
    the same mass over the rows of all processes, then every row mass 1. exp(logits / temp) is never computed:
    its columns are divided by their largest entry, which the first normalisation cancels; then its rows,
    whose divisors are what the iteration starts from. So every row and every column holds a 1 and nothing
    larger: whatever the logits, nothing overflows and no sum vanishes.

    The heads take their iterations together, so that each asks the other processes once.

    Args:
        scores: of the teacher, (R, w) rows a head; R may be 0 on some processes.
        temp: of the teacher.
        iterations: of both normalisations.
    """
    masses = [_logits(s, temp) for s in scores]
    peaks = _jointly(all_reduce_max, [_peak(mass) for mass in masses])
    rows = [_raise(mass, peak).exp() for mass, peak in zip(masses, peaks, strict=True)]
    columns = peaks
    for _ in range(iterations):
        sums = [row @ mass for row, mass in zip(rows, masses, strict=True)]
        # Up to a factor that the rows take out again, and that keeps many iterations from drifting away.
        columns = [total.amax() / total for total in _jointly(all_reduce_sum, sums)]
        rows = [1 / (mass @ column) for column, mass in zip(columns, masses, strict=True)]
    return [Targets(*parts) for parts in zip(masses, rows, columns, strict=True)]


class Sinkhorn(nn.Module):
    """sinkhorn_knopp() as targets; keeps nothing."""

    def forward(self, views: "Views", which: Which) -> Targets:
        """Of the rows of one head."""
        return views.balanced[which]


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
    def forward(self, views: "Views", which: Which) -> Targets:
        """Of the rows of one head."""
        if views.new_step:
            self.fold()
        scores = views.teacher(which)
        mass = _logits(scores, 1.0)
        self.pending = self.pending + mass.sum(dim=0)
        self.rows += len(mass)
        mass.sub_(self.center).div_(views.teacher_temp)
        _raise(mass, mass.new_zeros(mass.shape[1]))
        return Targets(mass, 1 / mass.sum(dim=1), mass.new_ones(mass.shape[1]))

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


def _logits(scores: Scores, temp: float) -> Tensor:
    """Logits over a temperature, (R, K) float32."""
    flat = Scores(scores.rows.flatten(0, -2), scores.prototypes)
    done = flat.rows.new_empty(len(flat.rows), len(flat.prototypes), dtype=torch.float32)
    for part in flat.parts():
        torch.mul(flat.logits(part), 1 / temp, out=done[:, part])
    return done


def _peak(mass: Tensor) -> Tensor:
    """The largest of each column, (K,)."""
    return mass.amax(dim=0) if len(mass) else mass.new_full((mass.shape[1],), -torch.inf)


def _raise(mass: Tensor, peak: Tensor) -> Tensor:
    """In place, logits (R, K) to exp(logits - peak - row); returns `row` (R,), the largest that is left."""
    largest = mass.new_empty(len(mass), 1)
    step = max(CPU_CHUNK // mass.shape[1], 1) if mass.device.type == "cpu" else max(len(mass), 1)
    for part, row in zip(mass.split(step), largest.split(step), strict=True):
        torch.amax(part.sub_(peak), dim=1, keepdim=True, out=row)
        part.sub_(row).exp_()
    return largest[:, 0]


def _jointly(reduce: Callable[[Tensor], Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each vector, reduced over all processes, in one collective."""
    return reduce(torch.cat(list(vectors))).split([len(v) for v in vectors])


def _take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    # A loss is built before K is known; what is loaded knows it.
    for name, buffer in list(module.named_buffers(recurse=False)):
        if prefix + name in state:
            module.register_buffer(name, buffer.new_zeros(state[prefix + name].shape))
