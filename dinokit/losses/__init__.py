"""What the student is trained to do. A shelf: a file here is a key of `losses` in a recipe.

A file defines `Config`, a dataclass with at least `weight`, and

    build(cfg: Config) -> nn.Module     # with .weight: float and forward(views: Views) -> Tensor ()

`Config.uses = frozenset({"masks"})` (a ClassVar) says that the loss reads the masked patches;
`Config.least_images` (a ClassVar) is the smallest number of images that it can compare.

Letters: B images in this forward pass on this process, G global crops, L local crops, D width, K prototypes,
M masked patches.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dinokit.losses._targets import Targets, Which, sinkhorn_knopp
from dinokit.models.head import LazyLogits, slices


@dataclass
class Views:
    """What student and teacher saw of one batch. Losses compute in float32 whatever the dtype here.

    `scores.logits()` gives all logits; loss and gradient without them is what losses/_entropy.py is for.
    """

    student_cls: LazyLogits  # (G+L, B, K) of the class token, global crops first
    teacher_cls: LazyLogits  # (G, B, K)
    student_feature: Tensor  # (G, B, D) class token of the backbone, after its final norm
    student_patch: LazyLogits  # (M, K') of masked patches; M may be 0
    teacher_patch: LazyLogits  # (M, K') of the same places in the unmasked crops
    mask_weight: Tensor  # (M,) one over the number of masked patches in the same crop
    teacher_temp: float
    new_step: bool  # the first forward pass of an optimiser step; only then may kept statistics move on
    whole_logits: bool = False  # compute losses from all logits at once, as they are written in the papers

    def teacher(self, which: Which) -> LazyLogits:
        """The teacher's scores by one of the heads."""
        return self.teacher_cls if which == "cls" else self.teacher_patch

    def parts(self, which: Which) -> list[slice]:
        """The prototypes of one of the heads in slices, for logits of the student and targets alike."""
        student = self.student_cls if which == "cls" else self.student_patch
        return slices(student, self.teacher(which))

    @cached_property
    def balanced(self) -> dict[Which, Targets]:
        """The targets of both heads by Sinkhorn-Knopp, for whichever losses ask."""
        teachers, parts = [self.teacher_cls, self.teacher_patch], [self.parts("cls"), self.parts("patch")]
        cls, patch = sinkhorn_knopp(teachers, self.teacher_temp, parts=parts)
        return {"cls": cls, "patch": patch}
