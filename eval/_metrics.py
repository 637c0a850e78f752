"""Scores of evaluators: classification, ranking, segmentation, depth, and masks of video objects.

N  images     C  classes     Q  queries     H, W  of a map or a frame
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.dense import IGNORE
from dinokit.runtime.distributed import all_reduce_sum

TOLERANCE = 0.008  # of the diagonal: distance at which two outlines count as the same

# The region where depth is evaluated, as top, bottom, left, right of a map of H x W.
DEPTH_CROPS: dict[str, Callable[[int, int], tuple[int, int, int, int]]] = {
    "none": lambda h, w: (0, h, 0, w),
    "eigen": lambda h, w: (45, 471, 41, 601),
    "garg": lambda h, w: (int(0.40810811 * h), int(0.99189189 * h), int(0.03594771 * w), int(0.96405229 * w)),
}

# Protocols of Revisited Oxford and Paris: kinds of images that count as found, and kinds that are ignored.
RETRIEVAL_PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


def class_scores(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Scores of classification with one class an image.

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
    """The share of images whose highest logit is an accepted class: ImageNet-ReaL (arXiv 2006.07159).

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
    ranks = torch.arange(1, len(scores) + 1, device=scores.device)[ends]
    found = found[ends]
    gained = found.diff(prepend=found.new_zeros(1))
    return float((gained * found / ranks).sum() / found[-1])


def mean_average_precision(logits: Tensor, truth: Tensor) -> float:
    """Average precision, averaged over the classes that have an image. Both (N, C); truth is bool."""
    logits, truth = logits.cpu(), truth.cpu()  # some devices have no float64
    present: Sequence[int] = truth.any(dim=0).nonzero().flatten().tolist()
    return sum(average_precision(logits[:, c], truth[:, c]) for c in present) / len(present)


def _share(right: Tensor) -> float:
    return float(right.cpu().double().mean())


def revisited_scores(
    ranked: Tensor, truths: Sequence[dict[str, list[int]]], ks: Sequence[int]
) -> dict[str, float]:
    """Mean average precision, and mean precision among the first k, of each protocol (arXiv 1803.11285).

    Args:
        ranked: (Q, N) numbers of the gallery's images, nearest first.
        truths: for each query the images of the same place, by kind: easy, hard, junk.
        ks: numbers of images.
    """
    scores: dict[str, float] = {}
    for protocol, (positive, ignored) in RETRIEVAL_PROTOCOLS.items():
        rows = list(_precisions(ranked, truths, positive, ignored, ks))
        if rows:  # else no query has an image of these kinds
            names = [f"mAP {protocol}", *(f"mP@{k} {protocol}" for k in ks)]
            scores |= dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    return scores


def _precisions(
    ranked: Tensor, truths: Sequence[dict[str, list[int]]], positive: Sequence[str], ignored: Sequence[str],
    ks: Sequence[int],
) -> Iterator[list[float]]:  # fmt: skip
    """Average precision and precisions among the first k, of each query that has a positive."""
    for row, truth in zip(ranked.cpu(), truths, strict=True):
        positives = torch.tensor([i for kind in positive for i in truth[kind]], dtype=torch.int64)
        if not len(positives):
            continue
        junk = torch.tensor([i for kind in ignored for i in truth[kind]], dtype=torch.int64)
        row = row[~torch.isin(row, junk)]
        places = torch.isin(row, positives).nonzero().flatten().double()  # from 0
        number = torch.arange(len(places), dtype=torch.float64)
        before = torch.where(places == 0, 1.0, number / places.clamp(min=1))
        after = (number + 1) / (places + 1)
        precision = float(((before + after) / 2).sum() / len(positives))
        reach = [min(k, int(places.max()) + 1) for k in ks]
        yield [precision, *(float((places < k).sum()) / k for k in reach)]


class Confusion:
    """Counts of pixels by true and by predicted class."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # [true, predicted]

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count pixels; both of one shape, truth is IGNORE where a pixel does not count."""
        valid = truth != IGNORE
        pairs = truth[valid].long() * len(self.counts) + predicted[valid].long()
        self.counts += pairs.bincount(minlength=self.counts.numel()).view_as(self.counts)

    def scores(self, names: Sequence[str]) -> dict[str, float]:
        """Over all processes: mIoU, mean accuracy, pixel accuracy, and the IoU of each class.

        A class that is neither true nor predicted anywhere has no IoU; one that is not true anywhere has no
        accuracy. Means are over the others.

        Raises:
            ValueError: if no pixel counts, or all are of one class.
        """
        counts = all_reduce_sum(self.counts.clone()).cpu().double()
        hit, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        present = [name for name, n in zip(names, true.tolist(), strict=True) if n]
        if len(present) < 2:
            what = f"are all of class '{present[0]}'" if present else "are all ignored"
            raise ValueError(f"The pixels of the test images {what}: there is nothing to distinguish.")
        union = true + predicted - hit
        iou = hit / union  # 0 / 0 is nan
        by_class = {f"iou {name}": v for name, v in zip(names, iou.tolist(), strict=True) if v == v}
        return {
            "mIoU": iou[union > 0].mean().item(),
            "mean accuracy": (hit / true)[true > 0].mean().item(),
            "pixel accuracy": (hit.sum() / true.sum()).item(),
            **by_class,
        }


def depth_errors(
    predicted: Tensor, truth: Tensor, least: float, most: float, crop: str = "none"
) -> dict[str, float] | None:
    """The errors of one depth map (H, W), in metres; None if no pixel counts.

    Pixels count if their true depth lies between `least` and `most`, inside the crop. Predictions are clamped
    to that range.

    Returns:
        'a1', 'a2', 'a3': shares with max(predicted / truth, truth / predicted) below 1.25, its square and its
        cube; 'abs_rel', 'sq_rel', 'rmse', 'rmse_log', 'log_10'; 'silog', 100 times the deviation of logs.
    """
    top, bottom, left, right = DEPTH_CROPS[crop](*truth.shape)
    predicted, truth = predicted[top:bottom, left:right], truth[top:bottom, left:right]
    valid = (truth > least) & (truth < most)
    if not valid.any():
        return None
    y, t = predicted[valid].double().clamp(least, most), truth[valid].double()
    ratio, g, gap = torch.maximum(y / t, t / y), y.log() - t.log(), y - t
    silog = (g.square().mean() - g.mean().square()).clamp_min(0).sqrt() * 100
    values = {
        **{f"a{n}": (ratio < 1.25**n).double().mean() for n in (1, 2, 3)},
        "abs_rel": (gap.abs() / t).mean(),
        "sq_rel": (gap.square() / t).mean(),
        "rmse": gap.square().mean().sqrt(),
        "rmse_log": g.square().mean().sqrt(),
        "log_10": (y.log10() - t.log10()).abs().mean(),
        "silog": silog,
    }
    return {key: value.item() for key, value in values.items()}


def region(predicted: Tensor, truth: Tensor) -> float:
    """J of DAVIS 2017 (arXiv 1704.00675): intersection over union of two masks (H, W) bool; 1 if empty."""
    union = (predicted | truth).sum().item()
    return (predicted & truth).sum().item() / union if union else 1.0


def contour(predicted: Tensor, truth: Tensor) -> float:
    """F: the harmonic mean of precision and recall of the outline, both masks (H, W) bool.

    A point of one outline is found if the other has one within 0.008 of the diagonal, rounded up to a pixel.
    F is 1 if neither mask has an outline, and 0 if only one has.
    """
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    predicted_line, true_line = outline(predicted), outline(truth)
    counts = predicted_line.sum().item(), true_line.sum().item()
    if not all(counts):
        return float(not any(counts))
    precision = (predicted_line & dilated(true_line, reach)).sum().item() / counts[0]
    recall = (true_line & dilated(predicted_line, reach)).sum().item() / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: Tensor) -> Tensor:
    """Pixels of (H, W) bool that differ from the one to the right, below, or across; (H, W) bool."""
    wide = F.pad(mask[None, None].float(), (0, 1, 0, 1), mode="replicate")[0, 0] > 0
    here = wide[:-1, :-1]
    return (here ^ wide[:-1, 1:]) | (here ^ wide[1:, :-1]) | (here ^ wide[1:, 1:])


def dilated(mask: Tensor, reach: int) -> Tensor:
    """All pixels within `reach` of one of (H, W) bool."""
    axis = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (axis[:, None].square() + axis.square() <= reach**2).float()
    return F.conv2d(mask[None, None].float(), disc[None, None], padding=reach)[0, 0] > 0.5
