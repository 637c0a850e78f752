"""A teacher that does not move: a backbone from a file, with its heads if the file is a run of ours."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dinokit.config.load import Recipe, load_recipe
from dinokit.features import fingerprint
from dinokit.models import Backbone, Tokens
from dinokit.models.head import PrototypeHead
from dinokit.train import checkpoint
from dinokit.train.state import MODEL
from dinokit.train.student_teacher import Network
from dinokit.weights import load_backbone


class FrozenTeacher:
    """No nn.Module on purpose: it is in no checkpoint and no optimiser, and nothing wraps or shards it.

    `backbone` is in evaluation mode; `heads` is the network that it was trained with, or None.
    """

    def __init__(self, backbone: Backbone, heads: Network | None) -> None:
        self.backbone, self.heads = backbone, heads
        self.device: torch.device | None = None
        self.fingerprint = fingerprint(heads if heads is not None else backbone)

    @torch.no_grad()
    def see(self, crops: Tensor) -> Tokens:
        """Tokens of crops (b, C, h, w); follows them to their device and into autocast at the first call."""
        if self.device != crops.device:
            self.device = crops.device
            for network in (self.backbone, self.heads):
                if isinstance(network, nn.Module):  # there may be no heads
                    _hold_as_computed(network.to(crops.device), crops.device)
        return self.backbone([crops], [None])[0]


def read_teacher(recipe: Recipe) -> FrozenTeacher:
    """The teacher of `teacher.frozen`, held against the crops and the student's heads.

    A run's folder with a checkpoint gives the heads too; of a run that distilled, the average is taken.

    Raises:
        LookupError: if there is no such file.
        ValueError: if it cannot be read, or does not fit the recipe.
    """
    source = Path(recipe.teacher.frozen)
    latest = checkpoint.latest(source / "checkpoints") if source.is_dir() else None
    network = _network(source, latest) if latest is not None else None
    backbone = load_backbone(source) if network is None else network.backbone
    _check_crops(recipe, backbone)
    if network is not None:
        _check_heads(recipe, network)
    return FrozenTeacher(backbone, network)


def _hold_as_computed(network: nn.Module, device: torch.device) -> None:
    """Weights in the dtype that autocast would take them to in every step: half the memory, and no casts."""
    if torch.is_autocast_enabled(device.type):
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.get_autocast_dtype(device.type))


def _network(run: Path, latest: checkpoint.Found) -> Network:
    network = Network(load_recipe(run / "recipe.yaml"))
    checkpoint.verify(latest)
    names = checkpoint.shapes(latest)
    whose = next(
        f"{MODEL}{who}."
        for who in ("average", "teacher")
        if any(n.startswith(f"{MODEL}{who}.") for n in names)
    )
    state = network.state_dict()  # its tensors are the network's own: reading into them fills it
    checkpoint.load(latest, {whose + name: value for name, value in state.items()})
    return network.eval().requires_grad_(False)


def _check_crops(recipe: Recipe, backbone: Backbone) -> None:
    source, crops, seen = recipe.teacher.frozen, recipe.crops, backbone.input
    for key, theirs in {"mean": seen.mean, "std": seen.std}.items():
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
    """The student's logits are held against the teacher's, one prototype against one."""
    theirs: dict[str, nn.Module] = {"cls": network.dino_head}
    if not network.shared:
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
