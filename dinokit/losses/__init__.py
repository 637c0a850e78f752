"""What the student is trained to do. A shelf: a file here is a key of `losses` in a recipe.

A file defines `Config`, a dataclass with at least `weight`, and

    build(cfg: Config) -> nn.Module     # with .weight: float and forward(views: Views) -> Tensor ()

`Config.uses = frozenset({"masks"})` (a ClassVar) says that the loss reads the masked patches;
`Config.least_images` (a ClassVar) is the smallest number of images that it can compare.

Letters: B images in this forward pass on this process, G global crops, L local crops, D width, K prototypes,
M masked patches.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Views:
    """What student and teacher saw of one batch. Losses compute in float32 whatever the dtype here."""

    student_cls: Tensor  # (G+L, B, K) logits of the class token, global crops first
    teacher_cls: Tensor  # (G, B, K) logits
    student_feature: Tensor  # (G, B, D) class token of the backbone, after its final norm
    student_patch: Tensor  # (M, K') logits of masked patches; M may be 0
    teacher_patch: Tensor  # (M, K') logits of the same places in the unmasked crops
    mask_weight: Tensor  # (M,) one over the number of masked patches in the same crop
    teacher_temp: float
    new_step: bool  # the first forward pass of an optimiser step; only then may kept statistics move on
