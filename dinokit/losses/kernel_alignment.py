"""Kernel alignment: the student's patches have the same structure as an earlier network's, up to a scale.

PaKA (patch-level kernel alignment, arXiv 2509.05606): one minus the linear CKA (Kornblith et al. 2019, arXiv
1905.00414) of the patches of a crop. As losses/gram.py it compares similarities alone, so a rotation of the
features does not count; nor do their scale and what all patches have in common.

PaKA compares local crops with the teacher's view of the same region, through heads of their own. Here are
its loss and the global crops: the student's, masked as it saw them, and those of the teacher of losses.gram.

    b  global crops      N  patches of a crop      D  width
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dinokit.losses import Views

EPS = 1e-6  # the smallest norm of a crop's features, and product of norms


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset({"gram"})
    weight: float = 1.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    ramp: int = 0  # steps over which the weight rises from 0, by half a cosine


def kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus <K, L> / max(|K| |L|, EPS) of the centred kernels K and L of a crop, mean over crops. ().

    K = H X X' H with H = I - 11'/N, and L likewise. 0 if the student's patches are the teacher's after a
    rotation, a scale and a shift; 1 if they have nothing in common.

    Args:
        student: patches X (b, N, D).
        teacher: patches (b, N, D') of the same places, no gradient.
    """
    kernels = []
    for x in (student, teacher):
        x = x if x.dtype == torch.float64 else x.float()
        x = x - x.mean(dim=1, keepdim=True)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(
            min=EPS
        )  # so products of four neither overflow nor vanish
        kernels.append((x @ x.mT).flatten(1))  # (b, N * N)
    ours, theirs = kernels
    norms = ours.norm(dim=1) * theirs.norm(dim=1)
    return (1 - (ours * theirs).sum(dim=1) / norms.clamp(min=EPS)).mean()


class KernelAlignmentLoss(nn.Module):
    """kernel_alignment() of the global crops' patches."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight = cfg.weight

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        return kernel_alignment(views.student_patches, views.gram_patches)


build = KernelAlignmentLoss
