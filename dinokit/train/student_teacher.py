"""The student and the teacher: the algorithm box of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).

B  images in this forward pass      G, L  global and local crops      N  patches a global crop      D  width
K  prototypes      M  masked patches
"""

import copy

import torch
from torch import Tensor, nn

from dinokit import models
from dinokit.config.load import Head, Recipe
from dinokit.data.batch import Batch
from dinokit.losses import HeadName, Views, build_losses
from dinokit.models import Backbone, Input, TokenReads
from dinokit.models.head import LazyLogits, PrototypeHead
from dinokit.runtime.distributed import local


class Network(nn.Module):
    """A backbone and its heads; the parts that gradients are clipped by are its children."""

    backbone: Backbone

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe)
        self.dino_head = build_head(self.backbone.width, recipe.heads.cls)
        self.shared = recipe.heads.patch is None
        if recipe.heads.patch is not None:
            self.ibot_head = build_head(self.backbone.width, recipe.heads.patch)

    def scores(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """Of class tokens (C, D) and masked patches (M, D), by the patches' own head or the same."""
        return both_scores(self.dino_head, None if self.shared else self.ibot_head, cls, patches)


def both_scores(
    head: nn.Module, patch_head: nn.Module | None, cls: Tensor, patches: Tensor
) -> tuple[LazyLogits, LazyLogits]:
    """Of class tokens (C, D) and patches (M, D), by two heads, or in one pass by the first."""
    if patch_head is not None:
        return head(cls), patch_head(patches)
    both: LazyLogits = head(torch.cat([cls, patches]))
    rows = both.rows.split([len(cls), len(patches)])
    return LazyLogits(rows[0], both.prototypes), LazyLogits(rows[1], both.prototypes)


class StudentTeacher(nn.Module):
    """A student, a teacher that is its moving average, and the losses between them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.student = Network(recipe)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.whole_logits = recipe.run.logits == "whole"
        self.names = list(recipe.losses)  # apart, because a dotted name cannot name a module
        self.losses = build_losses(recipe.losses, prototypes_of(recipe))

    @property
    def average(self) -> Network:
        """The moving average of the student, which is judged and kept: the teacher itself."""
        return self.teacher

    def train(self, mode: bool = True) -> "StudentTeacher":
        """As nn.Module.train, but the teacher stays in evaluation mode: it drops no branch."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, teacher_temp: float) -> dict[str, Tensor]:
        """Every loss (), before its weight, for a coloured batch on the device of the parameters.

        Args:
            batch: crops are normalised floats.
            teacher_temp: softmax temperature of the teacher's targets.
        """
        groups, masks = [batch.global_crops], [batch.masks]
        if len(batch.local_crops):
            groups, masks = [*groups, batch.local_crops], [*masks, None]
        views = self._views(
            teacher=self._see(batch.global_crops, batch.masked),
            student=self.student.backbone.read(groups, masks, batch.masked),
            batch=batch,
            teacher_temp=teacher_temp,
        )
        with torch.autocast(batch.global_crops.device.type, enabled=False):
            return {name: loss(views) for name, loss in zip(self.names, self.losses, strict=True)}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher <- momentum * teacher + (1 - momentum) * student, for every parameter."""
        teacher, student = ([local(p) for p in n.parameters()] for n in (self.teacher, self.student))
        torch._foreach_lerp_(teacher, student, 1 - momentum)  # cut up alike, if at all

    @torch.no_grad()
    def _see(self, crops: Tensor, masked: Tensor) -> TokenReads:
        return self.teacher.backbone.read([crops], [None], masked)

    def _views(self, teacher: TokenReads, student: TokenReads, batch: Batch, teacher_temp: float) -> Views:
        images = batch.images
        with torch.no_grad():
            teacher_cls, teacher_patch = self.teacher.scores(teacher.cls[0], teacher.patches)
        student_cls, student_patch = self.student.scores(torch.cat(student.cls), student.patches)
        return Views(
            student_cls=student_cls.by_crop(images),
            teacher_cls=teacher_cls.by_crop(images),
            student_feature=student.cls[0].unflatten(0, (-1, images)),
            student_patch=student_patch,
            teacher_patch=teacher_patch,
            mask_weight=batch.mask_weight,
            teacher_temp=teacher_temp,
            whole_logits=self.whole_logits,
        )


def prototypes_of(recipe: Recipe) -> dict[HeadName, int]:
    """The number of prototypes of each head."""
    heads = recipe.heads
    return {"cls": heads.cls.prototypes, "patch": (heads.patch or heads.cls).prototypes}


def build_backbone(recipe: Recipe) -> Backbone:
    """The backbone of a recipe, held against the crops that it will see.

    Raises:
        ValueError: if a crop's side is no multiple of the patch, the channels do not match, or masks find no
            token.
    """
    crops = recipe.crops
    backbone = models.build(recipe.architecture)
    if backbone.channels != len(crops.mean):
        raise ValueError(
            f"backbone.channels={backbone.channels}, but crops.mean and crops.std are given for "
            f"{len(crops.mean)} channels: give one number a channel."
        )
    if recipe.masks is not None and not hasattr(backbone, "mask_token"):
        raise ValueError(
            "`masks` are given, but the backbone has no mask token: set backbone.mask_token=true."
        )
    for name, group in {"globals": crops.globals, "locals": crops.locals}.items():
        if group.count and group.size % backbone.patch:
            near = max(round(group.size / backbone.patch), 1) * backbone.patch
            raise ValueError(
                f"crops.{name}.size={group.size} is no multiple of the backbone's patch of {backbone.patch} "
                f"pixels; the nearest that is: {near}."
            )
    backbone.input = Input(crops.globals.size, tuple(crops.mean), tuple(crops.std))
    return backbone


def build_head(width: int, cfg: Head) -> PrototypeHead:
    """The head that a recipe describes, for features of this width."""
    return PrototypeHead(width, cfg.prototypes, cfg.hidden, cfg.bottleneck, cfg.layers, cfg.norm_last_layer)
