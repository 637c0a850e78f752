"""How often classifiers are right.

N  images     C  classes
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_scores(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Scores of one answer an image.

    Args:
        logits: (N, C).
        y: (N,) int64, the classes.

    Returns:
        'top1'; 'top5', if there are more than five classes; 'mean_per_class': top-1 within each class that
        has an image, averaged over these classes.
    """
    first = logits.argmax(dim=1) == y
    scores = {"top1": _share(first)}
    if logits.shape[1] > 5:
        scores["top5"] = _share((logits.topk(5, dim=1).indices == y[:, None]).any(dim=1))
    counts = torch.bincount(y, minlength=logits.shape[1]).cpu().double()
    right = torch.bincount(y[first], minlength=logits.shape[1]).cpu().double()
    return scores | {"mean_per_class": float((right / counts)[counts > 0].mean())}


def accepted_share(logits: Tensor, accepted: Tensor) -> float:
    """How many images have an accepted class first: ImageNet-ReaL (arXiv 2006.07159).

    Args:
        logits: (N, C).
        accepted: (N, C) bool; an image without any does not count.
    """
    counted = accepted.any(dim=1)
    right = accepted.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    return _share(right[counted])


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """The mean of the precisions at which each positive is found; equal scores are found together.

    Args:
        scores: (N,), higher comes first.
        positive: (N,) bool, at least one of them true.
    """
    ranked, order = scores.sort(descending=True)
    found = positive[order].cumsum(dim=0).double()
    ends = torch.ones_like(positive)
    ends[:-1] = ranked[1:] != ranked[:-1]
    seen = torch.arange(1, len(scores) + 1, device=scores.device)[ends]
    found = found[ends]
    gained = found.diff(prepend=found.new_zeros(1))
    return float((gained * found / seen).sum() / found[-1])


def mean_average_precision(logits: Tensor, truth: Tensor) -> float:
    """Average precision, averaged over the classes that have an image. Both (N, C); truth is bool."""
    logits, truth = logits.cpu(), truth.cpu()  # some devices have no float64
    kept: Sequence[int] = truth.any(dim=0).nonzero().flatten().tolist()
    return sum(average_precision(logits[:, c], truth[:, c]) for c in kept) / len(kept)


def _share(right: Tensor) -> float:
    return float(right.cpu().double().mean())
