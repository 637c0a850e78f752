"""What the teacher asks of the student: scores of R rows to probabilities, balanced by the batch or a centre.

R  rows on this process      K  prototypes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dinokit.models.head import LazyLogits, slices
from dinokit.runtime.distributed import all_reduce_max, all_reduce_sum

if TYPE_CHECKING:
    from dinokit.losses import Views

Which = Literal["cls", "patch"]  # the class token's head, or that of the patches


@dataclass
class Targets:
    """Probabilities, a slice of prototypes at a time; over all slices, each row sums to 1."""

    parts: list[Tensor]  # (R, k) float32: in one piece, its rows would lie at bad distances

    def probabilities(self) -> Tensor:
        """(R, K)."""
        return torch.cat(self.parts, dim=1)


@torch.no_grad()
def sinkhorn_knopp(
    scores: Sequence[LazyLogits],
    temp: float,
    iterations: int = 3,
    parts: Sequence[Sequence[slice]] | None = None,
) -> list[Targets]:
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
        parts: the prototypes of each head in slices; None: as few as go by the rows of `scores`.
    """
    cuts = [slices(s) for s in scores] if parts is None else parts
    masses = [[z.div_(temp) for z in _logits(s, cut)] for s, cut in zip(scores, cuts, strict=True)]
    peaks = _jointly(all_reduce_max, [torch.cat([_peak(part) for part in mass]) for mass in masses])
    rows = [_raise(mass, peak).exp() for mass, peak in zip(masses, peaks, strict=True)]
    columns = peaks
    for _ in range(iterations):
        sums = [torch.cat([row @ part for part in mass]) for row, mass in zip(rows, masses, strict=True)]
        # Up to a factor that the rows take out again, and that keeps many iterations from drifting away.
        columns = [total.amax() / total for total in _jointly(all_reduce_sum, sums)]
        rows = [1 / _weighed(mass, column) for mass, column in zip(masses, columns, strict=True)]
    return [_scaled(*each) for each in zip(masses, rows, columns, strict=True)]


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
        mass = _logits(scores, views.parts(which))
        self.pending = self.pending + torch.cat([part.sum(dim=0) for part in mass])
        self.rows += len(mass[0])
        center = self.center.expand(self.pending.shape)
        for part, middle in zip(mass, _cut(center, mass), strict=True):
            part.sub_(middle).div_(views.teacher_temp)
        _raise(mass, torch.zeros_like(center))
        ones = torch.ones_like(center)
        return _scaled(mass, 1 / _weighed(mass, ones), ones)

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


def _logits(scores: LazyLogits, parts: Sequence[slice]) -> list[Tensor]:
    """(R, k) float32 a slice."""
    flat = LazyLogits(scores.rows.flatten(0, -2), scores.prototypes)
    return [flat.logits(part).float() for part in parts]


def _cut(column: Tensor, mass: Sequence[Tensor]) -> Sequence[Tensor]:
    """(K,) in the slices of mass."""
    return column.split([part.shape[1] for part in mass])


def _weighed(mass: Sequence[Tensor], column: Tensor) -> Tensor:
    """The sum of each row, every column times a factor: (R,)."""
    return torch.stack([part @ c for part, c in zip(mass, _cut(column, mass), strict=True)]).sum(dim=0)


def _scaled(mass: list[Tensor], row: Tensor, column: Tensor) -> Targets:
    """In place, mass times a factor a row and a factor a column."""
    for part, c in zip(mass, _cut(column, mass), strict=True):
        part.mul_(c).mul_(row[:, None])
    return Targets(mass)


def _peak(mass: Tensor) -> Tensor:
    """The largest of each column, (K,)."""
    return mass.amax(dim=0) if len(mass) else mass.new_full((mass.shape[1],), -torch.inf)


def _raise(mass: Sequence[Tensor], peak: Tensor) -> Tensor:
    """In place, logits to exp(logits - peak - row); returns `row` (R,), the largest that is left."""
    left = [part.sub_(p).amax(dim=1) for part, p in zip(mass, _cut(peak, mass), strict=True)]
    row = torch.stack(left).amax(dim=0)
    for part in mass:
        part.sub_(row[:, None]).exp_()
    return row


def _jointly(reduce: Callable[[Tensor], Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each vector, reduced over all processes, in one collective."""
    return reduce(torch.cat(list(vectors))).split([len(v) for v in vectors])


def _take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    # A loss is built before K is known; what is loaded knows it.
    for name, buffer in list(module.named_buffers(recurse=False)):
        if prefix + name in state:
            module.register_buffer(name, buffer.new_zeros(state[prefix + name].shape))
