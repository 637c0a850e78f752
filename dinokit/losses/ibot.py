"""iBOT: the student predicts the teacher's output for a masked patch, which the teacher sees.

Zhou et al. 2021 (arXiv 2111.07832); normalised as in DINOv2 (arXiv 2304.07193): by all global crops, masked
or not. With `patches=all` visible patches count like masked ones, as in TIPSv2 (iBOT++, arXiv 2604.12012).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from dinokit.losses import HeadName, Views, chunked
from dinokit.losses.centering import Centering
from dinokit.losses.sinkhorn import Sinkhorn
from dinokit.models.head import LazyLogits


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset({"heads", "masks"})
    weight: float = 1.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    student_temp: float = 0.1
    center_momentum: float = 0.9  # of the centre, with targets=centering
    # Which patches StudentTeacher gives the loss. all: of every global crop, each by 1 / their number.
    patches: Literal["masked", "all"] = "masked"


def ibot(student: Tensor, teacher: Tensor, weight: Tensor, crops: int, temperature: float) -> Tensor:
    """Cross-entropy of masked patches: the sum of each crop's mean, over the number of crops. Returns ().

    Args:
        student: (M, K) logits of the masked patches, or of all.
        teacher: (M, K) probabilities, no gradient.
        weight: (M,), one over the number of these patches in the same crop.
        crops: global crops in the batch, those without a mask included.
        temperature: of the student.
    """
    log_p = (student.float() / temperature).log_softmax(dim=-1)
    cross_entropy = -(teacher * log_p).sum(dim=-1)  # (M,)
    return (cross_entropy * weight).sum() / crops


class IBOTLoss(nn.Module):
    """ibot() with its targets."""

    def __init__(self, cfg: Config, prototypes: Mapping[HeadName, int]) -> None:
        super().__init__()
        self.weight, self.student_temp = cfg.weight, cfg.student_temp
        centering = cfg.targets == "centering"
        self.targets = Centering(prototypes["patch"], cfg.center_momentum) if centering else Sinkhorn("patch")

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        crops = views.teacher_cls.rows.shape[:2].numel()
        if not views.whole_logits:
            return self._in_slices(views, crops)
        teacher = self.targets(views.teacher_patch.logits(), views.teacher_temp)  # (M, K)
        return ibot(views.student_patch.logits(), teacher, views.mask_weight, crops, self.student_temp)

    def _in_slices(self, views: Views, crops: int) -> Tensor:
        """The same, for a slice of the prototypes at a time."""
        student = LazyLogits(views.student_patch.rows[None], views.student_patch.prototypes)
        pairs = views.mask_weight.new_ones(1, 1)
        targets = self.targets.in_slices(views, "patch")
        return chunked.cross_entropy(student, targets, pairs, views.mask_weight / crops, self.student_temp)


build = IBOTLoss
