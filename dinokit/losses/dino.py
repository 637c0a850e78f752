"""DINO: a crop must predict what the teacher says of another crop of the same image.

Caron et al. 2021 (arXiv 2104.14294), section 3.1; targets by Sinkhorn-Knopp as in DINOv2 (arXiv 2304.07193),
or by a centre.

    S  student crops: global ones first, then local    T  teacher crops: the global ones    B, K  as in Views
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dinokit.losses import Views
from dinokit.losses._entropy import cross_entropy
from dinokit.losses._targets import Targets, build_targets


@dataclass
class Config:
    weight: float = 1.0
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    student_temp: float = 0.1
    center_momentum: float = 0.9  # of the centre, with targets=centering


def dino(student: Tensor, teacher: Tensor, temp: float) -> Tensor:
    """Mean cross-entropy over all pairs of a student crop and another teacher crop. Returns ().

    The mean is over the batch too. Crop t of the teacher is crop t of the student; a crop is never compared
    with itself.

    Args:
        student: (S, B, K) logits.
        teacher: (T, B, K) probabilities, no gradient.
        temp: of the student.
    """
    student = student.float() / temp
    # A target sums to 1, so its cross-entropy is logsumexp minus an inner product: no log-softmax is kept.
    inner = torch.einsum("sbk,tbk->st", student, teacher) / student.shape[1]
    entropy = student.logsumexp(dim=-1).mean(dim=1, keepdim=True) - inner  # (S, T)
    return (entropy * _pairs(len(student), len(teacher), inner.device)).sum()


def _pairs(students: int, teachers: int, device: torch.device) -> Tensor:
    """The share of each pair of crops in the loss, (S, T)."""
    others = 1 - torch.eye(students, teachers, device=device)
    return others / (others.numel() - min(others.shape))


class DINOLoss(nn.Module):
    """dino() with its targets."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.student_temp = cfg.weight, cfg.student_temp
        self.targets = build_targets(cfg.targets, cfg.center_momentum)

    def forward(self, views: Views) -> Tensor:
        """()."""
        targets: Targets = self.targets(views, "cls")
        crops, images = views.teacher_cls.rows.shape[:2]
        if views.whole_logits:
            teacher = targets.probabilities().unflatten(0, (crops, images))
            return dino(views.student_cls.logits(), teacher, self.student_temp)
        device = views.teacher_cls.rows.device
        pairs = _pairs(len(views.student_cls.rows), crops, device)
        weight = torch.full((images,), 1 / images, device=device)
        return cross_entropy(views.student_cls, targets, pairs, weight, self.student_temp)


build = DINOLoss
