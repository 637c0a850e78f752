"""Losses of masks: focal, dice and the error of the quality (SAM, arXiv 2304.02643, section 3).

Each is a mean over the cells of a mask, and then a sum over masks: with a mean over all cells of many small
objects, a decoder that finds nothing is nearly right.

    M  masks     P  cells of a mask
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dinokit.segment.promptable import Answer
from dinokit.segment.recipe import Losses

SIDE = 256  # largest side, in cells, at which masks are compared


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of each mask: (..., P) -> (...); arXiv 1606.04797."""
    p = logits.sigmoid()
    return 1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + truth.sum(-1) + 1)


def mask_loss(logits: Tensor, truth: Tensor, weights: Losses) -> Tensor:
    """Weighted focal and dice loss of each mask: (..., P) and (..., P) of 0 and 1 -> (...)."""
    if weights.gamma == 0 and weights.alpha < 0:  # cross entropy, at a third of the cost
        focal = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)
    else:
        focal = sigmoid_focal_loss(logits, truth, alpha=weights.alpha, gamma=weights.gamma).mean(-1)
    return weights.focal * focal + weights.dice * dice_loss(logits, truth)


def iou(a: Any, b: Any) -> Any:
    """Intersection over union of masks (..., P) bool, tensors or arrays: (...); 1 if both are empty."""
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    return (both + (either == 0)) / (either + (either == 0))


def words_loss(logits: Tensor, names: Tensor) -> Tensor:
    """Cross entropy of each word, its mean over the words and the sum over answers, as a scalar.

    Args:
        logits: (M, V).
        names: (M, V) 1 for a word of the object, 0 for the others; NaN in rows whose object has no name.
    """
    named = ~names.isnan().any(dim=1) if names.shape[1] else names.new_zeros(len(names), dtype=torch.bool)
    target = names.nan_to_num()
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each.sum(dim=1) * named).sum() / max(1, names.shape[1])


@dataclass
class AnswerLoss:
    """Sums over the M prompts of one round."""

    loss: Tensor
    iou: Tensor  # of the single answer
    best: Tensor  # of the best of all answers
    quality_error: Tensor  # absolute


def answer_loss(answer: Answer, truth: Tensor, weights: Losses, several: bool) -> AnswerLoss:
    """The loss of one round.

    The single answer is trained in every round. Of the others the one with the least loss is trained, if
    `several`; the qualities of all answers are (SAM 2, arXiv 2408.00714).

    Args:
        answer: of M prompts.
        truth: (M, S, S) bool, on the canvas.
        weights: of the losses.
        several: whether the prompt is ambiguous, as a first click is.
    """
    side, trained = min(SIDE, truth.shape[-1]), answer.logits if several else answer.logits[:, :1]
    logits = F.interpolate(trained, (side, side), mode="bilinear", align_corners=False).flatten(2)
    if truth.shape[-1] != side:
        truth = F.interpolate(truth[:, None].float(), (side, side), mode="area")[:, 0] >= 0.5
    target = truth.flatten(1)[:, None].expand_as(logits)
    losses = mask_loss(logits, target.to(logits.dtype), weights)  # (M, 1 + A)
    reached = iou(logits.detach() > 0, target)
    error = answer.quality[:, : logits.shape[1]] - reached
    total = losses[:, 0] + weights.quality * error[:, 0].square()
    if several and losses.shape[1] > 1:
        total = total + losses[:, 1:].min(dim=1).values
        total = total + weights.quality * error[:, 1:].square().mean(dim=1)
    return AnswerLoss(
        total.sum(), reached[:, 0].sum(), reached.max(dim=1).values.sum(), error[:, 0].detach().abs().sum()
    )
