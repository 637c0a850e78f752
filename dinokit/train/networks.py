"""The networks of a run: a backbone with its heads, and the teachers that do not learn.

The student and its moving average are a `Network` each. A `FrozenTeacher` is read from the file in
`teacher.frozen`, the `GramTeacher` from the one in `teacher.gram.weights`.

D  width of a backbone      C  class tokens      M  patches that are compared
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dinokit import models
from dinokit.config.load import Head, Recipe, load_recipe
from dinokit.data.masks import BlockMasks
from dinokit.features.tokens import fingerprint
from dinokit.losses import HeadName
from dinokit.models import Backbone, Input, TokenReads
from dinokit.models.head import LazyLogits, PrototypeHead
from dinokit.train import checkpoint
from dinokit.train.checkpoint import MODEL
from dinokit.weights import load_backbone


class Network(nn.Module):
    """A backbone and its heads. Gradients are clipped child by child."""

    backbone: Backbone

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe)
        self.dino_head = build_head(self.backbone.width, recipe.heads.cls)
        self.one_head = recipe.heads.patch is None
        if recipe.heads.patch is not None:
            self.ibot_head = build_head(self.backbone.width, recipe.heads.patch)

    def read(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Tensor) -> TokenReads:
        """The tokens that losses use, as Backbone.read(): some patches of the first group of crops."""
        return self.backbone.read(crops, masks, patches)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """Logits of class tokens (C, D) and patches (M, D), by the patches' own head or the same."""
        return head_logits(self.dino_head, None if self.one_head else self.ibot_head, cls, patches)


class TeacherHeads(nn.Module):
    """Fresh heads for a frozen teacher of width D: for class tokens and for patches, or one for both."""

    def __init__(self, width: int, recipe: Recipe) -> None:
        super().__init__()
        self.dino_head = build_head(width, recipe.heads.cls)
        self.one_head = recipe.heads.patch is None
        if recipe.heads.patch is not None:
            self.ibot_head = build_head(width, recipe.heads.patch)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """Logits of class tokens (C, D) and patches (M, D)."""
        return head_logits(self.dino_head, None if self.one_head else self.ibot_head, cls, patches)


class GramTeacher(nn.Module):
    """The frozen backbone of losses.gram, of the student's architecture. Its weights are in checkpoints."""

    backbone: Backbone

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = build_backbone(recipe).requires_grad_(False).eval()


class FrozenTeacher:
    """A teacher that does not change: a backbone from a file, with its heads if the file is a run of dinokit.

    Deliberately no nn.Module: it is in no checkpoint and no optimiser, and nothing wraps or shards it.
    `backbone` is in evaluation mode; `heads` is the network that it was trained with, or None.
    """

    def __init__(self, backbone: Backbone, heads: Network | None) -> None:
        self.backbone, self.heads = backbone, heads
        self.device: torch.device | None = None
        self.fingerprint = fingerprint(heads if heads is not None else backbone)

    @torch.no_grad()
    def read(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Tensor) -> TokenReads:
        """As Network.read(). At the first call it moves to the crops' device, and to autocast's dtype."""
        self._move_to(crops[0].device)
        return self.backbone.read(crops, masks, patches)

    def _move_to(self, device: torch.device) -> None:
        if self.device != device:
            self.device = device
            for network in (self.backbone, self.heads):
                if network is not None:
                    _cast_as_autocast(network.to(device), device)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """As Network.logits(); for a teacher with heads."""
        assert self.heads is not None
        return self.heads.logits(cls, patches)

    def shared_tokens(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """What students are sent: tokens (C, w) and (M, w) up to the prototypes; without heads w is D."""
        if self.heads is None:
            return cls, patches
        one, two = self.logits(cls, patches)
        return one.rows, two.rows

    def logits_of_shared(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """logits() of the tokens that shared_tokens() gave in some process; for a teacher with heads."""
        assert self.heads is not None
        self._move_to(cls.device)
        head = self.heads.dino_head
        patch_head = head if self.heads.one_head else self.heads.ibot_head
        one, two = head.last_layer(cls.dtype), patch_head.last_layer(patches.dtype)
        return LazyLogits(cls, one), LazyLogits(patches, two)


def read_frozen_teacher(recipe: Recipe) -> FrozenTeacher:
    """The teacher of `teacher.frozen`, checked against the crops and the student's heads.

    A run's folder with a checkpoint gives the heads too; of a run that distilled, the EMA is taken.

    Raises:
        LookupError: if there is no such file.
        ValueError: if it cannot be read, or does not fit the recipe.
    """
    source = Path(recipe.teacher.frozen)
    latest = checkpoint.latest(source / "checkpoints") if source.is_dir() else None
    network = read_network(source, latest) if latest is not None else None
    backbone = load_backbone(source) if network is None else network.backbone
    _check_crops(recipe, backbone)
    if network is not None:
        _check_heads(recipe, network)
    return FrozenTeacher(backbone, network)


def read_network(run: Path, latest: checkpoint.SavedCheckpoint) -> Network:
    """The moving average in a run's checkpoint, with its heads, in evaluation mode; it cannot be trained."""
    network = Network(load_recipe(run / "recipe.yaml", of_run=True))
    checkpoint.verify(latest)
    names = checkpoint.shapes(latest)
    prefix = next(
        f"{MODEL}{module}."
        for module in ("average", "teacher")
        if any(n.startswith(f"{MODEL}{module}.") for n in names)
    )
    state = network.state_dict()  # its tensors are the network's own: reading into them fills it
    checkpoint.load(latest, {prefix + name: value for name, value in state.items()})
    network.backbone.licence = str(latest.values.get("licence", ""))
    return network.eval().requires_grad_(False)


def head_logits(
    head: nn.Module, patch_head: nn.Module | None, cls: Tensor, patches: Tensor
) -> tuple[LazyLogits, LazyLogits]:
    """Logits of class tokens (C, D) and patches (M, D), by two heads, or in one pass by the first."""
    if patch_head is not None:
        return head(cls), patch_head(patches)
    both: LazyLogits = head(torch.cat([cls, patches]))
    rows = both.rows.split([len(cls), len(patches)])
    return LazyLogits(rows[0], both.prototypes), LazyLogits(rows[1], both.prototypes)


def build_backbone(recipe: Recipe) -> Backbone:
    """The backbone of a recipe, checked against the crops that it will see.

    Raises:
        ValueError: if a crop's side is no multiple of the patch, the channels do not match, masks find no
            token, or a parameter has two names.
    """
    crops = recipe.crops
    backbone = models.build(recipe.architecture)
    if backbone.frozen_only:
        raise ValueError(
            f"backbone.name={recipe.architecture['name']} cannot be trained: {backbone.frozen_only}."
        )
    first: dict[int, str] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:  # checkpoints and rates by depth need one name
            raise ValueError(
                f"backbone.name={recipe.architecture['name']} has one parameter under two names, "
                f"{first[id(parameter)]} and {name}. To train it, register each module once."
            )
    if backbone.channels != len(crops.mean):
        raise ValueError(
            f"backbone.channels={backbone.channels}, but crops.mean and crops.std are given for "
            f"{len(crops.mean)} channels: give one number a channel."
        )
    if recipe.masks is not None and not hasattr(backbone, "mask_token"):
        way = (
            "set backbone.mask_token=true"
            if "mask_token" in recipe.architecture
            else "its code would need a parameter `mask_token` in the place of hidden patches. To train "
            "without masks: masks=null losses.ibot=null heads.patch=null"
        )
        raise ValueError(f"`masks` are given, but the backbone has no mask token: {way}.")
    sizes = {"globals.size": crops.globals, "locals.size": crops.locals}
    asked = {name: group.size for name, group in sizes.items() if group.count}
    asked |= {"gram_size": crops.gram_size}
    for i, variant in enumerate(crops.variants if crops.mixed else []):
        for size in (variant.globals.size, variant.locals.size, variant.gram_size):
            asked[f"mixed[{i}]: {size}"] = size
    for name, size in asked.items():
        if size % backbone.patch:
            near = max(round(size / backbone.patch), 1) * backbone.patch
            raise ValueError(
                f"crops.{name}={size} is no multiple of the backbone's patch of {backbone.patch} pixels; "
                f"the nearest that is: {near}."
            )
    backbone.input = Input(crops.globals.size, tuple(crops.mean), tuple(crops.std))
    return backbone


def build_head(width: int, cfg: Head) -> PrototypeHead:
    """The head that a recipe describes, for features of this width."""
    return PrototypeHead(width, **asdict(cfg))


def prototypes_of(recipe: Recipe) -> dict[HeadName, int]:
    """The number of prototypes of each head."""
    heads = recipe.heads
    return {"cls": heads.cls.prototypes, "patch": (heads.patch or heads.cls).prototypes}


def compares_all_patches(recipe: Recipe) -> bool:
    """Whether iBOT compares all patches of the global crops, not the masked ones alone."""
    return bool(recipe.teacher.frozen) or recipe.losses.get("ibot", {}).get("patches") == "all"


def block_masks(recipe: Recipe, backbone: Backbone) -> BlockMasks | None:
    """The mask generator for a recipe's global crops, or none."""
    side = recipe.crops.globals.size // backbone.patch
    return BlockMasks(recipe.masks, (side, side)) if recipe.masks is not None else None


def _cast_as_autocast(network: nn.Module, device: torch.device) -> None:
    """Store weights in the dtype that autocast would cast them to in every step: it saves half the memory."""
    if torch.is_autocast_enabled(device.type):
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.get_autocast_dtype(device.type))


def _check_crops(recipe: Recipe, backbone: Backbone) -> None:
    source, crops, trained_on = recipe.teacher.frozen, recipe.crops, backbone.input
    for key, theirs in {"mean": trained_on.mean, "std": trained_on.std}.items():
        ours = tuple(getattr(crops, key))
        if len(ours) != len(theirs) or any(abs(a - b) > 1e-4 for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(
                f"teacher.frozen={source} was trained on images of {key} {list(theirs)}, and this recipe's "
                f"have crops.{key}={list(ours)}: set crops.{key}=[{','.join(f'{x:g}' for x in theirs)}]."
            )
    patch = recipe.architecture.get("patch", backbone.patch)
    if patch != backbone.patch:
        raise ValueError(
            f"teacher.frozen={source} has patches of {backbone.patch} pixels and the student of {patch}: "
            f"they must see the same patches. Set backbone.patch={backbone.patch}, and crops to multiples."
        )


def _check_heads(recipe: Recipe, network: Network) -> None:
    """The student's logits are compared with the teacher's, prototype by prototype."""
    theirs: dict[str, nn.Module] = {"cls": network.dino_head}
    if not network.one_head:
        theirs["patch"] = network.ibot_head
    ours = {name: head for name, head in asdict(recipe.heads).items() if head is not None}
    if set(ours) != set(theirs):
        raise ValueError(
            f"teacher.frozen={recipe.teacher.frozen} has heads for {' and '.join(theirs)}, this recipe for "
            f"{' and '.join(ours)}: give heads.patch in the same way."
        )
    for name, head in theirs.items():
        assert isinstance(head, PrototypeHead)
        count = len(head.last_layer.weight_v)
        if ours[name]["prototypes"] != count:
            raise ValueError(
                f"teacher.frozen={recipe.teacher.frozen} has {count} prototypes, and "
                f"heads.{name}.prototypes={ours[name]['prototypes']}: set heads.{name}.prototypes={count}."
            )
