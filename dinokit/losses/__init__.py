"""The training objectives. A registry: a file here is a key of `losses` in a recipe.

An entry defines `Config`, a dataclass with at least `weight`, and

    build(cfg: Config, prototypes: Mapping[HeadName, int]) -> nn.Module

`prototypes` is the number of prototypes of each head; a loss that does not need it may define `build(cfg)`.
The module has `forward(views: Views) -> Tensor` of shape (), before the weight. It may have a method
`end_of_step()`, which the trainer calls in every process after each optimiser step: there it updates its
statistics.

`Config` may have four more:

    phase: tuple[float, float]  the part of the run in which the loss counts, as shares of its steps;
                                without it, the whole run
    uses: ClassVar[frozenset]   what the loss reads besides class features: "heads" (logits of student and
                                teacher), "masks" (the logits of masked patches), "projection" (of
                                `heads.projector`), "gram" (all patches of global crops, and those of the
                                Gram teacher); without it, {"heads"}. What no loss of a step reads is not
                                computed.
    ramp: int                   steps over which the loss's weight rises from 0
    least_images: ClassVar[int] the smallest number of images that the loss can compare

Letters: B images in this forward pass on this process, G global crops, L local crops, D width, K prototypes,
M masked patches, P width of the projection.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from dinokit.config import registry
from dinokit.losses import chunked
from dinokit.models.head import LazyLogits

HeadName = Literal["cls", "patch"]  # the head of the class token, or that of the patches
# Fields of Views that are computed only in steps with a loss that declares this in `uses`.
DECLARED = {
    "heads": ("student_cls", "teacher_cls"),
    "masks": ("student_patch", "teacher_patch", "mask_weight"),
    "projection": ("student_projection",),
    "gram": ("student_patches", "gram_patches"),
}


@dataclass(repr=False)
class NotDeclared:
    """In Views, for a field that no loss of this step declares: an empty tensor would make a loss NaN."""

    name: str  # of the field
    use: str  # key in DECLARED

    def __getattr__(self, key: str) -> NoReturn:
        if key.startswith("__"):  # of copies, and of what asks whether this is a tensor
            raise AttributeError(key)
        needed = "'heads' and 'masks'" if self.use == "masks" else f"'{self.use}'"
        raise AttributeError(
            f"no loss of this step declares that it reads views.{self.name}. If yours does, its Config "
            f"has uses: ClassVar[frozenset[str]] = frozenset({{...}}) with {needed} in it."
        )


@dataclass
class Views:
    """The outputs of student and teacher for one batch, which the losses compare.

    Losses compute in float32 whatever the dtype here. `student_cls.logits()` gives the logits of all
    prototypes; losses/chunked.py computes a loss without ever holding them all.
    """

    student_cls: LazyLogits  # (G+L, B, K) of the class token, global crops first
    teacher_cls: LazyLogits  # (G, B, K)
    student_feature: Tensor  # (G, B, D) class token of the backbone, after its final norm
    student_patch: LazyLogits  # (M, K') of masked patches, or of all (losses.ibot.patches); M may be 0
    teacher_patch: LazyLogits  # (M, K') of the same patches in the unmasked crops
    mask_weight: Tensor  # (M,) one over the number of these patches in the same crop
    teacher_temp: float
    whole_logits: bool = False  # compute losses from all logits at once, as the papers write them
    seed: int = 0  # of this step, the same in all processes: for random draws that they share
    # (G+L, B, P) of the class token by `heads.projector`, global crops first
    student_projection: Tensor = field(default_factory=lambda: torch.empty(0))
    # All patches of the global crops after the final norm, (G*B, N, D), of the student and of the Gram
    # teacher, on the student's grid.
    student_patches: Tensor = field(default_factory=lambda: torch.empty(0))
    gram_patches: Tensor = field(default_factory=lambda: torch.empty(0))
    # What the DINO loss compared with, for train/health.py: slices (G*B, k) of the targets, once it ran.
    class_targets: Sequence[Tensor] = ()
    # Heads whose targets some loss of this step balances: they share the collectives of one computation.
    balanced: Sequence[HeadName] = ("cls", "patch")
    _balanced_targets: dict[HeadName, chunked.SlicedTargets] = field(default_factory=dict)

    def keep(self, read: Collection[str]) -> None:
        """Replace the fields that no loss of this step declares. Logits of patches need the heads too."""
        absent = DECLARED.keys() - set(read)
        for use in absent | ({"masks"} if "heads" in absent else set()):
            for name in DECLARED[use]:
                setattr(self, name, NotDeclared(name, use))

    if not TYPE_CHECKING:  # else mypy would take every name for a field

        def __getattr__(self, name: str) -> NoReturn:
            have = [item.name for item in fields(self) if not item.name.startswith("_")]
            raise AttributeError(
                f"views has no '{name}'.{registry.suggest(name, have)} It has: {', '.join(have)}."
            )

    def teacher(self, head: HeadName) -> LazyLogits:
        """The teacher's logits of a head."""
        return self.teacher_cls if head == "cls" else self.teacher_patch

    def slices(self, head: HeadName) -> list[slice]:
        """The slices of a head's prototypes, the same for student and teacher."""
        student = self.student_cls if head == "cls" else self.student_patch
        return chunked.prototype_slices(student, self.teacher(head))

    def balanced_targets(self, head: HeadName) -> chunked.SlicedTargets:
        """The Sinkhorn-Knopp targets of a head in slices, computed once for all losses."""
        known = self._balanced_targets
        if head not in known:
            heads = [head, *(other for other in self.balanced if other != head and other not in known)]
            teachers, slices = [self.teacher(h) for h in heads], [self.slices(h) for h in heads]
            found = chunked.sinkhorn_knopp(teachers, self.teacher_temp, slices=slices)
            known.update(zip(heads, found, strict=True))
        return known[head]


def build_losses(
    sections: Mapping[str, Mapping[str, Any]], prototypes: Mapping[HeadName, int]
) -> nn.ModuleList:
    """The losses of a recipe, in its order.

    Args:
        sections: by name, the values of each loss's Config.
        prototypes: K of each head; a shared head stands under both names.
    """
    return nn.ModuleList(_build(name, values, prototypes) for name, values in sections.items())


def _build(name: str, values: Mapping[str, Any], prototypes: Mapping[HeadName, int]) -> nn.Module:
    module = registry.find("losses", name)
    cfg = module.Config(**values)
    takes_prototypes = len(inspect.signature(module.build).parameters) > 1
    loss: nn.Module = module.build(cfg, prototypes) if takes_prototypes else module.build(cfg)
    if learnt := [each for each, parameter in loss.named_parameters() if parameter.requires_grad]:
        raise ValueError(
            f"losses.{name} has parameters, such as {learnt[0]}, and only the backbone and its heads are "
            f"trained: a loss may have buffers. Give a fixed network requires_grad_(False)."
        )
    return loss


def uses(name: str) -> frozenset[str]:
    """What a loss reads besides class features, as its Config says."""
    return getattr(registry.read_config("losses", name), "uses", frozenset({"heads"}))


def end_of_step(losses: nn.Module) -> None:
    """Update the statistics of losses after an optimiser step. Every process must call it."""
    for module in losses.modules():
        update = getattr(module, "end_of_step", None)
        if update is not None:
            update()
