"""iBOT: a masked patch must be told as the teacher, who sees it, tells it.

Zhou et al. 2021 (arXiv 2111.07832); normalised as in DINOv2 (arXiv 2304.07193): by all global crops, masked
or not.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from dinokit.losses import Views
from dinokit.losses._entropy import cross_entropy
from dinokit.losses._targets import Targets, build_targets
from dinokit.models.head import LazyLogits


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset({"masks"})
    weight: float = 1.0
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    student_temp: float = 0.1
    center_momentum: float = 0.9  # of the centre, with targets=centering


def ibot(student: Tensor, teacher: Tensor, weight: Tensor, crops: int, temp: float) -> Tensor:
    """Cross-entropy of masked patches, averaged in each crop, summed, over the number of crops. Returns ().

    Args:
        student: (M, K) logits of the masked patches.
        teacher: (M, K) probabilities, no gradient.
        weight: (M,), one over the number of masked patches in the same crop.
        crops: global crops in the batch, those without a mask included.
        temp: of the student.
    """
    student = student.float() / temp
    entropy = student.logsumexp(dim=-1) - (student * teacher).sum(dim=-1)  # (M,)
    return (entropy * weight).sum() / crops


class IBOTLoss(nn.Module):
    """ibot() with its targets."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.student_temp = cfg.weight, cfg.student_temp
        self.targets = build_targets(cfg.targets, cfg.center_momentum)

    def forward(self, views: Views) -> Tensor:
        """()."""
        targets: Targets = self.targets(views, "patch")
        crops = views.teacher_cls.rows.shape[:2].numel()
        if views.whole_logits:
            student, teacher = views.student_patch.logits(), targets.probabilities()
            return ibot(student, teacher, views.mask_weight, crops, self.student_temp)
        one = LazyLogits(views.student_patch.rows[None], views.student_patch.prototypes)
        pairs = views.mask_weight.new_ones(1, 1)
        return cross_entropy(one, targets, pairs, views.mask_weight / crops, self.student_temp)


build = IBOTLoss
