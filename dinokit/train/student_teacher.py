"""The student and the teacher: the algorithm box of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).

In pretraining the teacher is the moving average (EMA) of the student. With `teacher.frozen` the same losses
distil a network from a file into the student (DINOv2, section 5): the teacher does not change, nothing is
masked, iBOT compares every patch of the global crops, and the EMA of the student is what is evaluated and
saved.

B  images in this forward pass      G, L  global and local crops      N  patches a global crop      D  width
K  prototypes      M  patches that are compared: the masked ones, or all (compares_all_patches)
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinokit.config.load import Recipe
from dinokit.data.batch import Batch
from dinokit.data.sampler import hash_key
from dinokit.losses import HeadName, Views, build_losses, uses
from dinokit.losses.sinkhorn import Sinkhorn
from dinokit.models import TokenReads
from dinokit.models.head import LazyLogits, Projector
from dinokit.runtime.distributed import local
from dinokit.train.health import step_signals
from dinokit.train.networks import (
    FrozenTeacher,
    GramTeacher,
    Network,
    TeacherHeads,
    compares_all_patches,
    prototypes_of,
    read_frozen_teacher,
)

GUIDE = "guide_"  # before the names of the losses that fresh heads of a frozen teacher learn by
NO_PATCHES = torch.empty(0, 1)  # where no loss of a step reads any
NO_LOGITS = LazyLogits(torch.empty(0, 1), torch.empty(0, 1))
NOT_AVERAGED = ("guide.", "projector.")  # children of the student that its moving average lacks


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
            self.average = ema
            self.teacher = read_frozen_teacher(recipe)
            ema.backbone.licence = self.teacher.backbone.licence  # also of what it teaches
            self.learns_teacher_heads = self.teacher.heads is None
            self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(self.teacher.fingerprint))))
            self.register_load_state_dict_pre_hook(_refuse_another_teacher)
        else:
            self.teacher = ema
        self.distils = bool(recipe.teacher.frozen)
        self.all_patches = compares_all_patches(recipe)
        self.gram_settings = recipe.teacher.gram
        if self.gram_settings is not None and self.gram_settings.weights:
            self.gram_teacher = GramTeacher(recipe)
        self.seed, self.whole_logits = recipe.run.seed, recipe.run.logits == "whole"
        self.loss_names = list(recipe.losses)  # apart, because a dotted name cannot name a module
        self.losses = build_losses(recipe.losses, prototypes_of(recipe))
        self.uses = {name: uses(name) for name in recipe.losses}
        self.student_temp: float | None = recipe.losses.get("dino", {}).get("student_temp")
        self.signals: dict[str, Tensor] = {}  # of the last forward pass
        self.has_signals = True  # False: none are computed, which `dinokit bench` compares with
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
        """As nn.Module.train, but the moving average and the Gram teacher stay in evaluation mode."""
        super().train(mode)
        self.ema.eval()
        if hasattr(self, "gram_teacher"):
            self.gram_teacher.eval()
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
        places, weight = self._compared_patches(batch, "masks" in read)
        teacher_cls = teacher_patch = student_cls = student_patch = NO_LOGITS
        # The teacher sees the global crops without masks; it is the Gram teacher too, if that has no weights.
        teaches_gram = "gram" in read and not hasattr(self, "gram_teacher")
        if "heads" in read or teaches_gram:
            with torch.no_grad():
                teacher, gram_patches = self._teacher_tokens(batch, places, teaches_gram)
        if "heads" in read:
            with torch.set_grad_enabled(self.learns_teacher_heads and torch.is_grad_enabled()):
                teacher_cls, teacher_patch = self._teacher_logits(batch, teacher)
        if not teaches_gram:
            gram_patches = self._gram_patches(batch) if "gram" in read else NO_PATCHES

        # The student sees the global crops, with masks if a loss reads masked patches, and the local crops.
        crops, masks = [batch.global_crops], [batch.masks if "masks" in read else None]
        if len(batch.local_crops):
            crops, masks = [*crops, batch.local_crops], [*masks, None]
        student, student_patches = self._read(self.student, crops, masks, places, "gram" in read)
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
                seed=hash_key(self.seed, batch.step),
                balanced=self._balanced_heads(active),
                student_patches=student_patches,
                gram_patches=gram_patches,
            )
            if "projection" in read:
                projection = self.student.get_submodule("projector")(cls.float())
                views.student_projection = projection.unflatten(0, (-1, batch.images))
            views.keep(read)
            chosen = dict(zip(self.loss_names, self.losses, strict=True))
            losses = {name: _one_number(name, chosen[name](views)) for name in active}
            if self.learns_teacher_heads and "heads" in read:
                losses |= self._teacher_head_losses(views, active, teacher, teacher_cls, teacher_patch)
            if self.has_signals:
                self.signals = step_signals(views, losses, batch.global_crops, self.student_temp)
        return losses

    def _teacher_tokens(self, batch: Batch, places: Tensor, all_patches: bool) -> tuple[TokenReads, Tensor]:
        """As _read() of the teacher; or from the batch, where several students share a teacher."""
        if batch.teacher_cls is None:
            return self._read(self.teacher, [batch.global_crops], [None], places, all_patches)
        patches = batch.teacher_patches
        rows = batch.teacher_cls[:0] if patches is None else patches.flatten(0, 1).index_select(0, places)
        return TokenReads([batch.teacher_cls], rows), NO_PATCHES

    def _teacher_logits(self, batch: Batch, teacher: TokenReads) -> tuple[LazyLogits, LazyLogits]:
        """Logits of the teacher's tokens, by fresh heads or its own, which a shared teacher runs in part."""
        heads: Any = getattr(self.student, "guide", self.teacher)
        if batch.teacher_cls is not None and not self.learns_teacher_heads:
            return heads.logits_of_shared(teacher.cls[0], teacher.patches)
        return heads.logits(teacher.cls[0], teacher.patches)

    def _read(
        self, network: Network | FrozenTeacher, crops: list[Tensor], masks: list[Tensor | None],
        places: Tensor, all_patches: bool,
    ) -> tuple[TokenReads, Tensor]:  # fmt: skip
        """A network's tokens at `places`, and, if asked, all patches of the global crops (G*B, N, D)."""
        if not all_patches:
            return network.read(crops, masks, places), NO_PATCHES
        everywhere, shape = self._all_places(crops[0])
        tokens = network.read(crops, masks, everywhere)
        compared = tokens.patches.index_select(0, places)
        return TokenReads(tokens.cls, compared), tokens.patches.unflatten(0, shape)

    @torch.no_grad()
    def _gram_patches(self, batch: Batch) -> Tensor:
        """The patches of a Gram teacher with weights of its own, on the student's grid: (G*B, N, D)."""
        crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        places, shape = self._all_places(crops)
        patches = self.gram_teacher.backbone.read([crops], [None], places).patches.unflatten(0, shape)
        patch = self.student.backbone.patch
        return resize_patches(patches, crops.shape[2:], batch.global_crops.shape[2:], patch)

    def _all_places(self, crops: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Indices of all patches of crops (b, C, h, w), and (b, N)."""
        patch = self.student.backbone.patch
        shape = len(crops), (crops.shape[2] // patch) * (crops.shape[3] // patch)
        return torch.arange(shape[0] * shape[1], device=crops.device), shape

    @torch.no_grad()
    def refresh_gram_teacher(self, step: int) -> None:
        """Copy the moving average to the Gram teacher if teacher.gram names this number of steps done."""
        cfg = self.gram_settings
        if cfg is None or not cfg.refresh_every or step < cfg.refresh_from:
            return
        count, rest = divmod(step - cfg.refresh_from, cfg.refresh_every)
        if rest == 0 and count < cfg.refreshes:
            for ours, ema in zip(
                self.gram_teacher.backbone.parameters(), self.ema.backbone.parameters(), strict=True
            ):
                local(ours).copy_(local(ema))

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """EMA <- momentum * EMA + (1 - momentum) * student, for every parameter."""
        student = [p for name, p in self.student.named_parameters() if not name.startswith(NOT_AVERAGED)]
        ema = [local(p) for p in self.ema.parameters()]
        torch._foreach_lerp_(ema, [local(p) for p in student], 1 - momentum)  # sharded alike, if at all

    def _compared_patches(self, batch: Batch, masks: bool) -> tuple[Tensor, Tensor]:
        """Places (M,) in the global crops' flattened patches, and weights (M,): 1 / how many of that crop.

        Without `masks`, no active loss compares patches: M is 0.
        """
        if not masks:
            return batch.masked[:0], batch.mask_weight[:0]
        if not self.all_patches:
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


def resize_patches(patches: Tensor, seen: Sequence[int], wanted: Sequence[int], patch: int) -> Tensor:
    """Patches (b, N', D) of crops of `seen` pixels on the grid (b, N, D) of crops of `wanted`: bicubic.

    Heights and widths apart, without antialiasing, in float32, before any normalisation (arXiv 2508.10104).
    """
    old, new = ([side // patch for side in sides] for sides in (seen, wanted))
    if old == new:
        return patches
    maps = patches.float().transpose(1, 2).unflatten(2, old)
    maps = functional.interpolate(maps, size=new, mode="bicubic", align_corners=False, antialias=False)
    return maps.flatten(2).transpose(1, 2)


def _one_number(name: str, value: object) -> Tensor:
    """The value of a loss, if it is a tensor (); more numbers would multiply the gradients of all losses."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    kind = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ValueError(
        f"losses.{name} gives {kind}: its forward(views) must return one number as a tensor of shape (), "
        f"such as a mean over the images."
    )


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
