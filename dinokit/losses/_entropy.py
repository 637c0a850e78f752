"""Cross-entropy of student and teacher, a few prototypes at a time: whole logits of the student never exist.

The backward pass computes them again (Chen et al. 2016, arXiv 1604.06174): a third more work for the
prototypes, which are a few percent of a step, and none of its largest tensors.

    S, T  student and teacher crops      b  images, or masked patches      K  prototypes      w  their width
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dinokit.losses._targets import Targets
from dinokit.models.head import LazyLogits


def cross_entropy(
    student: LazyLogits, targets: Targets, pairs: Tensor, weight: Tensor, temp: float
) -> Tensor:
    """The sum over s, t, b of pairs[s, t] * weight[b] * H(targets[t, b], softmax(student[s, b] / temp)).

    H(p, q) is -sum(p log q) over the prototypes. Returns (), float32; its gradient goes to the student alone.

    Args:
        student: rows (S, b, w).
        targets: T * b rows.
        pairs: (S, T), 0 or more.
        weight: (b,), 0 or more.
        temp: of the student.
    """
    crops = (pairs.shape[1], len(weight))
    value: Tensor = _CrossEntropy.apply(
        student.rows, student.prototypes, pairs, weight, temp,
        *(part.unflatten(0, crops) for part in targets.parts),
    )  # fmt: skip
    return value


class _CrossEntropy(torch.autograd.Function):
    """A target sums to 1, so its cross-entropy is a logsumexp minus an inner product with the logits."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, prototypes: Tensor, pairs: Tensor, weight: Tensor, temp: float,
        *targets: Tensor,
    ) -> Tensor:  # fmt: skip
        norm = rows.new_full(rows.shape[:2], -torch.inf, dtype=torch.float32)  # (S, b)
        inner = weight.new_zeros(len(weight), *pairs.shape)  # (b, S, T)
        scores = LazyLogits(rows, prototypes)
        for part, target in _by_slice(targets):
            z = scores.logits(part).float().div_(temp)  # (S, b, k)
            inner += torch.einsum("sbk,tbk->bst", z, target)
            norm = torch.logaddexp(norm, _logsumexp_(z))
        ctx.save_for_backward(rows, prototypes, pairs, weight, norm, *targets)
        ctx.temp = temp
        return torch.einsum("bst,st,b->", norm.T[:, :, None] - inner, pairs, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, prototypes, pairs, weight, norm, *targets = ctx.saved_tensors
        share = (pairs.sum(dim=1)[:, None] * weight).log() - norm  # (S, b)
        pulls = (pairs.T[:, :, None] * weight)[..., None]  # (T, S, b, 1)
        scores, flat, scale = LazyLogits(rows, prototypes), rows.flatten(0, 1), grad / ctx.temp
        grad_rows = torch.zeros_like(flat, dtype=torch.float32)
        grad_prototypes = torch.empty_like(prototypes)
        for part, target in _by_slice(targets):
            z = scores.logits(part).float().div_(ctx.temp)
            z.add_(share[..., None]).exp_()
            for crop, pull in zip(target, pulls, strict=True):
                z.addcmul_(crop, pull, value=-1)
            g = z.mul_(scale).flatten(0, 1).to(rows.dtype)  # (S * b, k), of the logits before the temperature
            grad_rows += g @ prototypes[part]
            torch.mm(g.T, flat, out=grad_prototypes[part])
        return grad_rows.view_as(rows).to(rows.dtype), grad_prototypes, *[None] * (3 + len(targets))


def _by_slice(targets: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each slice of the prototypes, with the targets (T, b, k) there."""
    stop = 0
    for target in targets:
        start, stop = stop, stop + target.shape[-1]
        yield slice(start, stop), target


def _logsumexp_(z: Tensor) -> Tensor:
    """Of the last dimension. Overwrites z: as many numbers more would not stay in a CPU's cache."""
    peak = z.amax(dim=-1, keepdim=True)
    return z.sub_(peak).exp_().sum(dim=-1).log_().add_(peak[..., 0])
