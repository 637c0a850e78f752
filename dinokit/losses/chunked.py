"""Targets and cross-entropy for many prototypes, in slices: the student's logits never exist as a whole.

The losses use it by default (`run.logits=chunks`); with `run.logits=whole` they compute sinkhorn.py,
centering.py, dino() and ibot() as they are written, to the same numbers (tests/losses/test_chunked.py). With
65,536 prototypes, the logits are the largest tensors of a step. Here the teacher's are stored once, as
targets, and the student's one slice at a time; the backward pass computes them again (Chen et al. 2016, arXiv
1604.06174), which costs a third more work for the prototypes and a few percent of a step.

    R     rows on this process            K  prototypes      k  prototypes of a slice
    S, T  student and teacher crops       b  images, or masked patches      w  width of the prototypes
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinokit.models.head import LazyLogits
from dinokit.runtime.distributed import all_reduce_max, all_reduce_sum

# Logits in memory at a time. On a CPU they and what is computed from them stay in the cache; on a GPU each
# kernel is long enough to hide its launch.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**26


@dataclass
class SlicedTargets:
    """Probabilities in slices of the prototypes; over all slices, each row sums to 1."""

    slices: list[Tensor]  # (R, k) float32; rows of one tensor (R, K) would lie too far apart in memory

    def probabilities(self) -> Tensor:
        """(R, K)."""
        return torch.cat(self.slices, dim=1)


def prototype_slices(*heads: LazyLogits) -> list[slice]:
    """Slices of the prototypes, which the arguments share, so small that the logits of each stay few."""
    rows = max(lazy.rows.shape[:-1].numel() for lazy in heads)
    count, chunk = len(heads[0].prototypes), CPU_CHUNK if heads[0].rows.device.type == "cpu" else GPU_CHUNK
    step = max(chunk // max(rows, 1), 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@torch.no_grad()
def sinkhorn_knopp(
    heads: Sequence[LazyLogits],
    temperature: float,
    iterations: int = 3,
    slices: Sequence[Sequence[slice]] | None = None,
) -> list[SlicedTargets]:
    """sinkhorn.sinkhorn_knopp() for the teacher's logits of several heads, with one collective for all.

    Not on logarithms: mass = exp(logits / temperature) is computed once, and the iterations only change a
    factor for each row and each column; the targets are mass * row * column. So that no sum overflows or
    vanishes, mass is divided by the largest entry of each column, then of each row: the largest entry of
    every row and column is then 1. The divisors of the columns have no effect, because the first
    normalisation is of columns; those of the rows are the first factors of the rows.

    Args:
        heads: for each the (..., w) rows of the teacher; there may be no rows on some processes.
        temperature: of the teacher.
        iterations: of both normalisations.
        slices: for each head the slices of its prototypes; None: as prototype_slices() makes them.
    """
    slices = [prototype_slices(lazy) for lazy in heads] if slices is None else slices
    logits = [
        [z.div_(temperature) for z in _logits(lazy, of_head)]
        for lazy, of_head in zip(heads, slices, strict=True)
    ]
    peaks = _reduce_together(all_reduce_max, [torch.cat([_column_max(z) for z in head]) for head in logits])
    rows = [_exp_below_peaks_(head, peak).exp() for head, peak in zip(logits, peaks, strict=True)]
    masses, columns = logits, peaks  # the line above has overwritten the logits with mass
    for _ in range(iterations):
        sums = [torch.cat([row @ part for part in mass]) for row, mass in zip(rows, masses, strict=True)]
        # Any common factor cancels in the rows; this one keeps the numbers near 1 over many iterations.
        columns = [total.amax() / total for total in _reduce_together(all_reduce_sum, sums)]
        rows = [1 / _weighted_row_sums(mass, column) for mass, column in zip(masses, columns, strict=True)]
    return [_scale_(*head) for head in zip(masses, rows, columns, strict=True)]


@torch.no_grad()
def centered_softmax(
    lazy: LazyLogits, center: Tensor, temperature: float, slices: Sequence[slice]
) -> tuple[SlicedTargets, Tensor]:
    """centering.centered_softmax() of the teacher's logits, and their sum over the rows (K,)."""
    logits = _logits(lazy, slices)
    total = torch.cat([z.sum(dim=0) for z in logits])
    for z, middle in zip(logits, _split_columns(center, logits), strict=True):
        z.sub_(middle).div_(temperature)
    _exp_below_peaks_(logits, torch.zeros_like(center))
    ones = torch.ones_like(center)
    return _scale_(logits, 1 / _weighted_row_sums(logits, ones), ones), total


def cross_entropy(
    student: LazyLogits, targets: SlicedTargets, pairs: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    """The sum over s, t, b of pairs[s, t] * weight[b] * H(targets[t, b], p[s, b]).

    p is softmax(student / temperature), and H(q, p) is -sum(q log p) over the prototypes. Returns (),
    float32; its gradient goes to the student alone.

    Args:
        student: rows (S, b, w).
        targets: T * b rows.
        pairs: (S, T), 0 or more.
        weight: (b,), 0 or more.
        temperature: of the student.
    """
    crops = (pairs.shape[1], len(weight))
    value: Tensor = _CrossEntropy.apply(
        student.rows, student.prototypes, pairs, weight, temperature,
        *(target.unflatten(0, crops) for target in targets.slices),
    )  # fmt: skip
    return value


class _CrossEntropy(torch.autograd.Function):
    """A target sums to 1, so its cross-entropy is a logsumexp minus an inner product with the logits."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, prototypes: Tensor, pairs: Tensor, weight: Tensor, temperature: float,
        *targets: Tensor,
    ) -> Tensor:  # fmt: skip
        norm = rows.new_full(rows.shape[:2], -torch.inf, dtype=torch.float32)  # (S, b)
        inner = weight.new_zeros(len(weight), *pairs.shape)  # (b, S, T)
        lazy = LazyLogits(rows, prototypes)
        for part, target in _slices_of(targets):
            z = lazy.logits(part).float().div_(temperature)  # (S, b, k)
            inner += torch.einsum("sbk,tbk->bst", z, target)
            norm = torch.logaddexp(norm, _logsumexp_(z))
        ctx.save_for_backward(rows, prototypes, pairs, weight, norm, *targets)
        ctx.temperature = temperature
        return torch.einsum("bst,st,b->", norm.T[:, :, None] - inner, pairs, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, prototypes, pairs, weight, norm, *targets = ctx.saved_tensors
        # Gradient of logits z[s, b]: the sum over t of pairs[s, t] * weight[b] * (p[s, b] - targets[t, b]).
        log_share = (pairs.sum(dim=1)[:, None] * weight).log() - norm  # (S, b): z + log_share gives p's part
        weights = (pairs.T[:, :, None] * weight)[..., None]  # (T, S, b, 1)
        lazy, flat, scale = LazyLogits(rows, prototypes), rows.flatten(0, 1), grad / ctx.temperature
        grad_rows = torch.zeros_like(flat, dtype=torch.float32)
        grad_prototypes = torch.empty_like(prototypes)
        for part, target in _slices_of(targets):
            z = lazy.logits(part).float().div_(ctx.temperature)
            z.add_(log_share[..., None]).exp_()
            for crop, factor in zip(target, weights, strict=True):
                z.addcmul_(crop, factor, value=-1)
            g = z.mul_(scale).flatten(0, 1).to(rows.dtype)  # (S * b, k), of the logits before the temperature
            grad_rows += g @ prototypes[part]
            torch.mm(g.T, flat, out=grad_prototypes[part])
        return grad_rows.view_as(rows).to(rows.dtype), grad_prototypes, *[None] * (3 + len(targets))


def _slices_of(targets: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each slice of the prototypes, with its targets (T, b, k)."""
    stop = 0
    for target in targets:
        start, stop = stop, stop + target.shape[-1]
        yield slice(start, stop), target


def _logsumexp_(z: Tensor) -> Tensor:
    """Over the last dimension. Overwrites z: another tensor of its size would not stay in a CPU's cache."""
    peak = z.amax(dim=-1, keepdim=True)
    return z.sub_(peak).exp_().sum(dim=-1).log_().add_(peak[..., 0])


def _logits(lazy: LazyLogits, slices: Sequence[slice]) -> list[Tensor]:
    """Logits (R, k) float32 of each slice."""
    flat = LazyLogits(lazy.rows.flatten(0, -2), lazy.prototypes)
    return [flat.logits(part).float() for part in slices]


def _split_columns(column: Tensor, mass: Sequence[Tensor]) -> Sequence[Tensor]:
    """(K,) in the slices of mass."""
    return column.split([part.shape[1] for part in mass])


def _weighted_row_sums(mass: Sequence[Tensor], column: Tensor) -> Tensor:
    """The sum of each row, every column times a factor: (R,)."""
    return torch.stack([part @ c for part, c in zip(mass, _split_columns(column, mass), strict=True)]).sum(
        dim=0
    )


def _scale_(mass: list[Tensor], row: Tensor, column: Tensor) -> SlicedTargets:
    """In place, mass times a factor for each row and each column."""
    for part, c in zip(mass, _split_columns(column, mass), strict=True):
        part.mul_(c).mul_(row[:, None])
    return SlicedTargets(mass)


def _column_max(z: Tensor) -> Tensor:
    """The largest of each column, (k,)."""
    return z.amax(dim=0) if len(z) else z.new_full((z.shape[1],), -torch.inf)


def _exp_below_peaks_(logits: Sequence[Tensor], peak: Tensor) -> Tensor:
    """In place, logits to exp(logits - peak - row). Returns `row` (R,), the row maxima of logits - peak."""
    largest = [z.sub_(p).amax(dim=1) for z, p in zip(logits, _split_columns(peak, logits), strict=True)]
    row = torch.stack(largest).amax(dim=0)
    for z in logits:
        z.sub_(row[:, None]).exp_()
    return row


def _reduce_together(reduce: Callable[[Tensor], Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each vector, reduced over all processes, in one collective."""
    return reduce(torch.cat(list(vectors))).split([len(v) for v in vectors])
