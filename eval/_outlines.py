"""The two measures of DAVIS 2017 (Pont-Tuset et al., arXiv 1704.00675): regions and their outlines.

H, W  of a frame
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BOUND = 0.008  # of the diagonal: how far apart two outlines may lie and still be one


def region(given: Tensor, truth: Tensor) -> float:
    """J: the intersection over the union of two masks (H, W) bool; 1 if both are empty."""
    union = (given | truth).sum().item()
    return (given & truth).sum().item() / union if union else 1.0


def contour(given: Tensor, truth: Tensor) -> float:
    """F: the harmonic mean of precision and recall of the outline of `given`, both masks (H, W) bool.

    A point of one outline is found if the other has one within 0.008 of the diagonal, rounded up to a pixel.
    If neither has an outline it is 1, if one has none, 0.
    """
    reach = math.ceil(BOUND * math.hypot(*truth.shape))
    ours, theirs = outline(given), outline(truth)
    counts = ours.sum().item(), theirs.sum().item()
    if not all(counts):
        return float(not any(counts))
    precision = (ours & thickened(theirs, reach)).sum().item() / counts[0]
    recall = (theirs & thickened(ours, reach)).sum().item() / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: Tensor) -> Tensor:
    """Pixels of (H, W) bool that differ from the one to the right, below, or across; (H, W) bool."""
    wide = F.pad(mask[None, None].float(), (0, 1, 0, 1), mode="replicate")[0, 0] > 0
    here = wide[:-1, :-1]
    return (here ^ wide[:-1, 1:]) | (here ^ wide[1:, :-1]) | (here ^ wide[1:, 1:])


def thickened(mask: Tensor, reach: int) -> Tensor:
    """All pixels within `reach` of one of (H, W) bool."""
    axis = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (axis[:, None].square() + axis.square() <= reach**2).float()
    return F.conv2d(mask[None, None].float(), disc[None, None], padding=reach)[0, 0] > 0.5
