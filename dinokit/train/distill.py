"""Distillation: a small student learns from a large teacher that does not move.

The losses are those of pretraining. What differs (DINOv2, arXiv 2304.07193, section 5): the teacher is
frozen, nothing is masked and no branch is dropped, iBOT compares every patch of the global crops, and a
moving average of the student is what is judged and kept.

A teacher without heads of its own gets fresh ones, and these must learn: left as they are drawn, they would
hash its features at random. They learn by the same losses with the teacher as its own student, its backbone
held still: a global crop must tell the prototypes of the other one, a patch its own (online clustering on a
frozen backbone: SwAV, arXiv 2006.09882; CAPI's head on the teacher's patches, arXiv 2502.08769). They cannot
be a moving average of the student's heads: those read features of the student's width.

B  images in this forward pass      G, L  global and local crops      N  patches a global crop      D  width
K  prototypes
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.config.load import Recipe
from dinokit.data.batch import Batch
from dinokit.losses import Views, build_losses
from dinokit.models import Tokens
from dinokit.models.head import LazyLogits
from dinokit.runtime.distributed import local
from dinokit.train.frozen import read_teacher
from dinokit.train.student_teacher import Network, both_scores, build_head, prototypes_of

GUIDE = "guide_"  # before the names of the losses that fresh heads learn by


class Guide(nn.Module):
    """Fresh heads for a frozen backbone of width D."""

    def __init__(self, width: int, recipe: Recipe) -> None:
        super().__init__()
        self.dino_head = build_head(width, recipe.heads.cls)
        self.shared = recipe.heads.patch is None
        if recipe.heads.patch is not None:
            self.ibot_head = build_head(width, recipe.heads.patch)

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """Of class tokens (C, D) and patches (M, D), by the patches' own head or the same."""
        return both_scores(self.dino_head, None if self.shared else self.ibot_head, cls, patches)


class Distillation(nn.Module):
    """A student, its moving average, and the losses between the student and a frozen teacher.

    Fresh heads of the teacher are a part of `student`, so they are optimised, clipped and saved like its own.
    """

    fingerprint: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.student = Network(recipe)
        self.average = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.teacher = read_teacher(recipe)
        if self.teacher.heads is None:
            self.student.guide = Guide(self.teacher.backbone.width, recipe)
        self.whole_logits = recipe.run.logits == "whole"
        self.names = list(recipe.losses)  # apart, because a dotted name cannot name a module
        self.losses = build_losses(recipe.losses, prototypes_of(recipe))
        fresh = self.teacher.heads is None
        self.guide_losses = build_losses(recipe.losses if fresh else {}, prototypes_of(recipe))
        self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(self.teacher.fingerprint))))
        self.register_load_state_dict_pre_hook(_refuse_another_teacher)

    def train(self, mode: bool = True) -> "Distillation":
        """As nn.Module.train, but the average stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self

    def forward(self, batch: Batch, teacher_temp: float) -> dict[str, Tensor]:
        """Every loss (), before its weight; those of fresh heads are named 'guide_...'.

        Args:
            batch: crops are normalised floats; without masks.
            teacher_temp: softmax temperature of the teacher's targets.
        """
        groups = [batch.global_crops, *([batch.local_crops] if len(batch.local_crops) else [])]
        seen = self.teacher.see(batch.global_crops)
        heads = self.teacher.heads
        scores = self.student.get_submodule("guide") if heads is None else heads.scores
        teacher = scores(seen.cls, seen.patches.flatten(0, 1))
        images, patches = batch.images, seen.patches.shape[:2]
        every = torch.arange(patches.numel(), device=seen.cls.device)
        student = self.student.backbone.read(groups, [None] * len(groups), every)
        said = self.student.scores(torch.cat(student.cls), student.patches)
        views = Views(
            student_cls=said[0].by_crop(images),
            teacher_cls=teacher[0].detach().by_crop(images),
            student_feature=student.cls[0].unflatten(0, (-1, images)),
            student_patch=said[1],
            teacher_patch=teacher[1].detach(),
            mask_weight=torch.full((patches.numel(),), 1 / patches[1], device=seen.cls.device),
            teacher_temp=teacher_temp,
            whole_logits=self.whole_logits,
        )
        with torch.autocast(batch.global_crops.device.type, enabled=False):
            values = {name: loss(views) for name, loss in zip(self.names, self.losses, strict=True)}
            if self.teacher.heads is None:
                values |= self._guide(views, teacher, seen)
        return values

    def _guide(self, views: Views, teacher: tuple[LazyLogits, LazyLogits], seen: Tokens) -> dict[str, Tensor]:
        """The losses with the teacher as its own student; those that heads have no part in are left out."""
        images = views.teacher_cls.rows.shape[1]
        own = replace(
            views,
            student_cls=teacher[0].by_crop(images),
            student_feature=seen.cls.unflatten(0, (-1, images)),
            student_patch=teacher[1],
        )
        if "balanced_targets" in vars(views):  # the same teacher: what it asks is not reckoned twice
            vars(own)["balanced_targets"] = views.balanced_targets
        values = {GUIDE + name: loss(own) for name, loss in zip(self.names, self.guide_losses, strict=True)}
        return {name: value for name, value in values.items() if value.requires_grad}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Average <- momentum * average + (1 - momentum) * student, for every parameter."""
        own = [p for name, p in self.student.named_parameters() if not name.startswith("guide.")]
        average = [local(p) for p in self.average.parameters()]
        torch._foreach_lerp_(average, [local(p) for p in own], 1 - momentum)


def _refuse_another_teacher(
    module: "Distillation", state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    # Not against the buffer: a checkpoint is read into the module's own tensors, so that is it already.
    saved = state[f"{prefix}fingerprint"]
    if bytes(saved.tolist()).hex() != module.teacher.fingerprint:
        raise ValueError(
            f"teacher.frozen is not the teacher that this run began with: its weights have the fingerprint "
            f"{module.teacher.fingerprint}, and the run began with {bytes(saved.tolist()).hex()}. Find the "
            f"old file, or choose another run.out."
        )
