"""DINO: the student's crop predicts the teacher's output for another crop of the same image.

Caron et al. 2021 (arXiv 2104.14294), section 3.1; targets by Sinkhorn-Knopp as in DINOv2 (arXiv 2304.07193),
or by centering.

    S  student crops: global ones first, then local    T  teacher crops: the global ones    B, K  as in Views
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dinokit.losses import HeadName, Views, chunked
from dinokit.losses.centering import Centering
from dinokit.losses.sinkhorn import Sinkhorn


@dataclass
class Config:
    weight: float = 1.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    student_temp: float = 0.1
    center_momentum: float = 0.9  # of the centre, with targets=centering
    local_weight: float = 1.0  # of pairs with a local crop; DINOv3 ends with 0.5 (arXiv 2508.10104)


def dino(student: Tensor, teacher: Tensor, temperature: float, local_weight: float = 1.0) -> Tensor:
    """Mean cross-entropy over images and pairs of a student crop and a different teacher crop. Returns ().

    Crop t of the teacher is crop t of the student; a crop is never compared with itself.

    Args:
        student: (S, B, K) logits.
        teacher: (T, B, K) probabilities, no gradient.
        temperature: of the student.
        local_weight: of pairs with a local crop.
    """
    log_p = (student.float() / temperature).log_softmax(dim=-1)
    cross_entropy = -torch.einsum("tbk,sbk->st", teacher, log_p) / student.shape[1]  # (S, T)
    pairs = pair_weights(len(student), len(teacher), student.device, local_weight)
    return (cross_entropy * pairs).sum()


def pair_weights(students: int, teachers: int, device: torch.device, local_weight: float = 1.0) -> Tensor:
    """The weight of each pair of crops in the mean, (S, T): 0 for a crop and itself."""
    others = 1 - torch.eye(students, teachers, device=device)
    weights = others / (others.numel() - min(others.shape))  # over the number of pairs
    if local_weight != 1:
        weights[teachers:] *= local_weight
    return weights


class DINOLoss(nn.Module):
    """dino() with its targets."""

    def __init__(self, cfg: Config, prototypes: Mapping[HeadName, int]) -> None:
        super().__init__()
        self.weight, self.student_temp = cfg.weight, cfg.student_temp
        self.local_weight = cfg.local_weight
        centering = cfg.targets == "centering"
        self.targets = Centering(prototypes["cls"], cfg.center_momentum) if centering else Sinkhorn("cls")

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        if not views.whole_logits:
            return self._in_slices(views)
        teacher = self.targets(views.teacher_cls.logits(), views.teacher_temp)  # (T, B, K)
        views.class_targets = [teacher.flatten(0, 1)]
        return dino(views.student_cls.logits(), teacher, self.student_temp, self.local_weight)

    def _in_slices(self, views: Views) -> Tensor:
        """The same, for a slice of the prototypes at a time."""
        crops, images = views.teacher_cls.rows.shape[:2]
        device = views.teacher_cls.rows.device
        pairs = pair_weights(len(views.student_cls.rows), crops, device, self.local_weight)
        weight = torch.full((images,), 1 / images, device=device)
        targets = self.targets.in_slices(views, "cls")
        views.class_targets = targets.slices
        return chunked.cross_entropy(views.student_cls, targets, pairs, weight, self.student_temp)


build = DINOLoss
