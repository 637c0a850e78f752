"""Gram anchoring: the student's patches keep the similarities that an earlier network gives them.

Siméoni et al. 2025 (DINOv3, arXiv 2508.10104): late in long runs patch features lose their locality, and this
loss keeps it. Only similarities are compared: features may change as long as those stay.

    b  global crops      N  patches of a crop      D  width
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.losses import Views

Clamp = Literal["none", "both", "teacher", "pairs"]


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset({"gram"})
    weight: float = 2.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    ramp: int = 0  # steps over which the weight rises from 0, by half a cosine
    level: Literal["image", "batch"] = "image"  # batch: similarities between patches of all crops
    # Which negative similarities count as 0. both: the student's and the teacher's. teacher: the teacher's,
    # as the released code does. pairs: the teacher's, and the student's where both are negative.
    clamp: Literal["none", "both", "teacher", "pairs"] = "none"
    # How it is computed: N x N similarities, or D x D products; auto takes the smaller of both.
    form: Literal["auto", "patches", "channels"] = "auto"

    def __post_init__(self) -> None:
        if self.form == "channels" and self.clamp != "none":
            raise ValueError(
                f"losses.gram.form=channels never computes a similarity, so clamp={self.clamp} cannot be "
                "applied: take form=patches or clamp=none."
            )


def gram(student: Tensor, teacher: Tensor, clamp: Clamp = "none") -> Tensor:
    """Mean squared difference of the cosines of all pairs of patches. Returns ().

    Args:
        student: patches (b, N, D).
        teacher: patches (b, N, D') of the same places, no gradient.
        clamp: as in Config.
    """
    x, y = _on_the_sphere(student), _on_the_sphere(teacher)
    ours, theirs = x @ x.mT, y @ y.mT  # (b, N, N)
    if clamp in ("both", "teacher"):
        theirs = theirs.clamp(min=0)
    if clamp == "both":
        ours = ours.clamp(min=0)
    if clamp == "pairs":
        ours = torch.where((theirs < 0) & (ours < 0), 0, ours)
        theirs = theirs.clamp(min=0)
    return (ours - theirs).square().mean()


def gram_by_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """gram() without clamp from D x D products, for teachers of the student's width. Returns ().

    With s = x + y and d = x - y, x x' - y y' is (s d' + d s') / 2, so its squared norm is half of
    <s' s, d' d> + <s' d, d' s>. This is exact, and a small difference is not one of large numbers.
    """
    x, y = _on_the_sphere(student), _on_the_sphere(teacher)
    s, d = x + y, x - y
    cross = s.mT @ d  # (b, D, D)
    squares = ((s.mT @ s) * (d.mT @ d)).sum(dim=(1, 2)) + (cross * cross.mT).sum(dim=(1, 2))
    return squares.mean() / (2 * x.shape[1] ** 2)


def _on_the_sphere(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


class GramLoss(nn.Module):
    """gram() of the global crops' patches: the student's, masked as it saw them, and the Gram teacher's."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.clamp, self.form, self.level = cfg.weight, cfg.clamp, cfg.form, cfg.level

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        student, teacher = views.student_patches, views.gram_patches
        if self.level == "batch":
            student, teacher = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
        smaller = student.shape[1] > student.shape[2] and self.clamp == "none"
        if self.form == "channels" or (self.form == "auto" and smaller):
            return gram_by_channels(student, teacher)
        return gram(student, teacher, self.clamp)


build = GramLoss
