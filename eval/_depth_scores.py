"""Losses of depth, and how far a depth map is from the truth.

B  images     H, W  of a map     valid  pixels with a reading, where the depth is above 0
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-3  # metres, added before the logarithm
VARIANCE_FREE = (
    100 / 38_400
)  # share of a training in which the scale-invariant loss sees the mean error alone
SCALES = (1, 2, 4, 6)  # pixels between two that the gradient loss looks at

# Where depth is judged, as top, bottom, left, right of a map of H x W.
CROPS: dict[str, Callable[[int, int], tuple[int, int, int, int]]] = {
    "none": lambda h, w: (0, h, 0, w),
    "eigen": lambda h, w: (45, 471, 41, 601),
    "garg": lambda h, w: (int(0.40810811 * h), int(0.99189189 * h), int(0.03594771 * w), int(0.96405229 * w)),
}


def scale_invariant(given: Tensor, truth: Tensor, done: float) -> Tensor:
    """sqrt(Var(g) + 0.15 mean(g)^2) of g = ln(given) - ln(truth) over valid pixels (Eigen et al. 2014). ().

    Args:
        given: depths (B, 1, H, W).
        truth: depths, 0 where there is no reading.
        done: share of the training. The variance, the unbiased one, is left out in the first 100 of the
            published 38,400 steps, and in as large a part of a shorter training: one of a hundred steps would
            never hear of it.
    """
    valid = truth > 0
    g = (given[valid] + EPS).log() - (truth[valid] + EPS).log()
    square = 0.15 * g.mean().square()
    return (square if done < VARIANCE_FREE else square + g.var()).clamp_min(1e-12).sqrt()


def gradient(given: Tensor, truth: Tensor, form: Literal["spatial", "reference"] = "spatial") -> Tensor:
    """How much the logarithmic error changes over two pixels, summed over four scales. ().

    Both (B, 1, H, W). At a scale of s every s-th pixel is looked at; |d(i) - d(i + 2)| of valid pixels i and
    i + 2, along both axes, is summed and divided by the number of valid pixels.

    Args:
        given: depths.
        truth: depths, 0 where there is no reading.
        form: "reference" takes the batch and the channel for the two axes, as DINOv2's code does by mistake:
            with two images it is 0.
    """
    first, second = (2, 3) if form == "spatial" else (0, 1)
    total = given.new_zeros(())
    for scale in SCALES:
        keep = [slice(None)] * 4
        keep[first] = keep[second] = slice(None, None, scale)
        valid = truth[tuple(keep)] > 0
        d = (given[tuple(keep)] + EPS).log() - (truth[tuple(keep)] + EPS).log()
        steps = [_two_apart(d, valid, axis) for axis in (first, second)]
        total = total + torch.stack(steps).sum() / valid.sum().clamp_min(1)
    return total


def errors(
    given: Tensor, truth: Tensor, least: float, most: float, crop: str = "none"
) -> dict[str, float] | None:
    """The errors of one depth map (H, W), in metres; None if no pixel can be judged.

    Judged are pixels whose true depth lies between `least` and `most`, inside the crop; what is given is cut
    off to that range.

    Returns:
        'a1', 'a2', 'a3': shares with max(given / truth, truth / given) below 1.25, its square, its cube;
        'abs_rel', 'sq_rel', 'rmse', 'rmse_log', 'log_10', 'silog' (100 times the deviation of logarithms).
    """
    top, bottom, left, right = CROPS[crop](*truth.shape)
    given, truth = given[top:bottom, left:right], truth[top:bottom, left:right]
    judged = (truth > least) & (truth < most)
    if not judged.any():
        return None
    y, t = given[judged].double().clamp(least, most), truth[judged].double()
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


def _two_apart(d: Tensor, valid: Tensor, axis: int) -> Tensor:
    n = max(d.shape[axis] - 2, 0)
    both = valid.narrow(axis, 0, n) & valid.narrow(axis, d.shape[axis] - n, n)
    step = d.narrow(axis, 0, n) - d.narrow(axis, d.shape[axis] - n, n)
    return torch.where(both, step.abs(), 0.0).sum()
