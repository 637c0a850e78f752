"""The student and the teacher: the algorithm box of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).

In pretraining the teacher is the moving average (EMA) of the student. With `teacher.frozen` the same losses
distil a network from a file into the student (DINOv2, section 5): the teacher does not change, nothing is
masked, iBOT compares every patch of the global crops, and the EMA of the student is what is evaluated and
saved.

B  images in this forward pass      G, L  global and local crops      N  patches a global crop      D  width
K  prototypes      M  patches that are compared: the masked ones, or with `teacher.frozen` all
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinokit import models
from dinokit.config.load import Head, Recipe
from dinokit.data.batch import Batch
from dinokit.data.masks import BlockMasks
from dinokit.losses import HeadName, Views, build_losses, uses
from dinokit.losses.sinkhorn import Sinkhorn
from dinokit.models import Backbone, Input, TokenReads
from dinokit.models.head import LazyLogits, Projector, PrototypeHead
from dinokit.runtime.distributed import local
from dinokit.train.health import step_signals

if TYPE_CHECKING:
    from dinokit.train.pretrained import FrozenTeacher

GUIDE = "guide_"  # before the names of the losses that fresh heads of a frozen teacher learn by
NO_LOGITS = LazyLogits(torch.empty(0, 1), torch.empty(0, 1))  # where no loss reads any
NOT_AVERAGED = ("guide.", "projector.")  # children of the student that its moving average lacks


class TeacherHeads(nn.Module):
    """Fresh heads for a frozen teacher of width D: for class tokens and for patches, or one for both."""

    def __init__(self, width: int, recipe: Recipe) -> None:
        super().__init__()
        self.dino_head = build_head(width, recipe.heads.cls)
        self.shared = recipe.heads.patch is None
        if recipe.heads.patch is not None:
            self.ibot_head = build_head(width, recipe.heads.patch)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """Of class tokens (C, D) and patches (M, D)."""
        return head_logits(self.dino_head, None if self.shared else self.ibot_head, cls, patches)


class Network(nn.Module):
    """A backbone and its heads. Gradients are clipped child by child."""

    backbone: Backbone

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe)
        self.dino_head = build_head(self.backbone.width, recipe.heads.cls)
        self.shared = recipe.heads.patch is None
        if recipe.heads.patch is not None:
            self.ibot_head = build_head(self.backbone.width, recipe.heads.patch)

    def read(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Tensor) -> TokenReads:
        """The tokens that losses use, as Backbone.read(): some patches of the first group of crops."""
        return self.backbone.read(crops, masks, patches)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """Of class tokens (C, D) and patches (M, D), by the patches' own head or the same."""
        return head_logits(self.dino_head, None if self.shared else self.ibot_head, cls, patches)


class StudentTeacher(nn.Module):
    """A student, its moving average, a teacher, and the losses between student and teacher.

    A loss counts in its `phase` of the run; what no loss of a step reads is not computed in that step.

    A frozen teacher without heads gets fresh ones, which are a child `guide` of the student, so they are
    optimised, clipped and saved like its own heads. They learn by the same losses with the teacher as its own
    student: a global crop must predict the prototypes of the other one, and a patch its own (clustering
    online on a frozen backbone: SwAV, arXiv 2006.09882; CAPI, arXiv 2502.08769).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.student = Network(recipe)
        ema = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.teacher: Network | FrozenTeacher
        self.learns_teacher_heads = False
        if recipe.teacher.frozen:
            from dinokit.train.pretrained import read_frozen_teacher

            self.average = ema
            self.teacher = read_frozen_teacher(recipe)
            self.learns_teacher_heads = self.teacher.heads is None
            self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(self.teacher.fingerprint))))
            self.register_load_state_dict_pre_hook(_refuse_another_teacher)
        else:
            self.teacher = ema
        self.distils = bool(recipe.teacher.frozen)
        self.whole_logits = recipe.run.logits == "whole"
        self.loss_names = list(recipe.losses)  # apart, because a dotted name cannot name a module
        self.losses = build_losses(recipe.losses, prototypes_of(recipe))
        self.uses = {name: uses(name) for name in recipe.losses}
        self.student_temp: float | None = recipe.losses.get("dino", {}).get("student_temp")
        self.signals: dict[str, Tensor] = {}  # of the last forward pass
        self.guide_losses = nn.ModuleList()
        projector = recipe.heads.projector
        if projector is not None:
            width = self.student.backbone.width
            self.student.projector = Projector(width, projector.hidden, projector.output, projector.layers)
        if self.learns_teacher_heads:
            self.student.guide = TeacherHeads(self.teacher.backbone.width, recipe)
            self.guide_losses = build_losses(recipe.losses, prototypes_of(recipe))

    @property
    def ema(self) -> Network:
        """The moving average of the student, which is evaluated and saved; without `frozen`, the teacher."""
        ema = self.average if self.distils else self.teacher
        assert isinstance(ema, Network)
        return ema

    def train(self, mode: bool = True) -> "StudentTeacher":
        """As nn.Module.train, but the moving average stays in evaluation mode: it drops no branch."""
        super().train(mode)
        self.ema.eval()
        return self

    def forward(
        self, batch: Batch, teacher_temp: float, active: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Every active loss (), before its weight; those of fresh teacher heads are named 'guide_...'.

        Args:
            batch: crops are normalised floats, on the device of the parameters.
            teacher_temp: softmax temperature of the teacher's targets.
            active: names of the losses to compute; None: all.
        """
        active = self.loss_names if active is None else active
        read = frozenset().union(*(self.uses[name] for name in active))
        crops, masks = [batch.global_crops], [batch.masks if "masks" in read else None]
        if len(batch.local_crops):
            crops, masks = [*crops, batch.local_crops], [*masks, None]
        places, weight = self._compared_patches(batch)
        if "masks" not in read:
            places, weight = places[:0], weight[:0]
        teacher_cls = teacher_patch = student_cls = student_patch = NO_LOGITS

        if "heads" in read:
            with torch.no_grad():
                teacher = self.teacher.read([batch.global_crops], [None], places)
            with torch.set_grad_enabled(self.learns_teacher_heads and torch.is_grad_enabled()):
                heads: Any = (
                    self.student.get_submodule("guide") if self.learns_teacher_heads else self.teacher
                )
                teacher_cls, teacher_patch = heads.logits(teacher.cls[0], teacher.patches)
        student = self.student.read(crops, masks, places)
        cls = torch.cat(student.cls)
        if "heads" in read:
            student_cls, student_patch = self.student.logits(cls, student.patches)

        with torch.autocast(batch.global_crops.device.type, enabled=False):
            views = Views(
                student_cls=student_cls.by_crop(batch.images),
                teacher_cls=teacher_cls.detach().by_crop(batch.images),
                student_feature=student.cls[0].unflatten(0, (-1, batch.images)),
                student_patch=student_patch,
                teacher_patch=teacher_patch.detach(),
                mask_weight=weight,
                teacher_temp=teacher_temp,
                whole_logits=self.whole_logits,
                balanced=self._balanced_heads(active),
            )
            if "projection" in read:
                projection = self.student.get_submodule("projector")(cls.float())
                views.student_projection = projection.unflatten(0, (-1, batch.images))
            chosen = dict(zip(self.loss_names, self.losses, strict=True))
            losses = {name: chosen[name](views) for name in active}
            if self.learns_teacher_heads and "heads" in read:
                losses |= self._teacher_head_losses(views, active, teacher, teacher_cls, teacher_patch)
            self.signals = step_signals(views, losses, batch.global_crops, self.student_temp)
        return losses

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """EMA <- momentum * EMA + (1 - momentum) * student, for every parameter."""
        student = [p for name, p in self.student.named_parameters() if not name.startswith(NOT_AVERAGED)]
        ema = [local(p) for p in self.ema.parameters()]
        torch._foreach_lerp_(ema, [local(p) for p in student], 1 - momentum)  # sharded alike, if at all

    def _compared_patches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Places (M,) in the global crops' flattened patches, and weights (M,): 1 / how many of that crop."""
        if not self.distils:
            return batch.masked, batch.mask_weight
        crops, _, height, width = batch.global_crops.shape
        patch, device = self.student.backbone.patch, batch.global_crops.device
        grid = (height // patch) * (width // patch)  # N
        return torch.arange(crops * grid, device=device), torch.full((crops * grid,), 1 / grid, device=device)

    def _balanced_heads(self, active: Sequence[str]) -> list[HeadName]:
        """The heads whose targets the active losses balance by Sinkhorn-Knopp."""
        losses = [loss for name, loss in zip(self.loss_names, self.losses, strict=True) if name in active]
        return [part.head for loss in losses for part in loss.modules() if isinstance(part, Sinkhorn)]

    def _teacher_head_losses(
        self, views: Views, active: Sequence[str], teacher: TokenReads, cls: LazyLogits, patch: LazyLogits
    ) -> dict[str, Tensor]:
        """The losses with the teacher as its own student; those that do not depend on heads are left out."""
        images = views.teacher_cls.rows.shape[1]
        own = replace(  # with the same teacher, and its balanced targets
            views,
            student_cls=cls.by_crop(images),
            student_feature=teacher.cls[0].unflatten(0, (-1, images)),
            student_patch=patch,
        )
        guides = dict(zip(self.loss_names, self.guide_losses, strict=True))
        losses = {GUIDE + name: guides[name](own) for name in active if "projection" not in self.uses[name]}
        return {name: value for name, value in losses.items() if value.requires_grad}


def head_logits(
    head: nn.Module, patch_head: nn.Module | None, cls: Tensor, patches: Tensor
) -> tuple[LazyLogits, LazyLogits]:
    """Of class tokens (C, D) and patches (M, D), by two heads, or in one pass by the first."""
    if patch_head is not None:
        return head(cls), patch_head(patches)
    both: LazyLogits = head(torch.cat([cls, patches]))
    rows = both.rows.split([len(cls), len(patches)])
    return LazyLogits(rows[0], both.prototypes), LazyLogits(rows[1], both.prototypes)


def build_backbone(recipe: Recipe) -> Backbone:
    """The backbone of a recipe, checked against the crops that it will see.

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


def prototypes_of(recipe: Recipe) -> dict[HeadName, int]:
    """The number of prototypes of each head."""
    heads = recipe.heads
    return {"cls": heads.cls.prototypes, "patch": (heads.patch or heads.cls).prototypes}


def block_masks(recipe: Recipe, backbone: Backbone) -> BlockMasks | None:
    """The mask generator for a recipe's global crops, or none."""
    side = recipe.crops.globals.size // backbone.patch
    return BlockMasks(recipe.masks, (side, side)) if recipe.masks is not None else None


def _refuse_another_teacher(
    module: StudentTeacher, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    # Not compared with the buffer: a checkpoint is read into the module's own tensors, so they are equal.
    saved = bytes(state[f"{prefix}fingerprint"].tolist()).hex()
    teacher: Any = module.teacher
    if saved != teacher.fingerprint:
        raise ValueError(
            f"teacher.frozen is not the teacher that this run began with: its weights have the fingerprint "
            f"{teacher.fingerprint}, and the run began with {saved}. Find the old file, or choose another "
            f"run.out."
        )
