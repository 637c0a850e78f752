"""Weights from files that a recipe names: `teacher.frozen`, and `backbone.weights` to start the student from.

Only a run's first step reads the file of `backbone.weights`. The filled backbone is saved in the run as
start.safetensors, so the run can resume, and be compared with its start, when the file is gone.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dinokit.config.load import Recipe, load_recipe, to_yaml
from dinokit.features.tokens import fingerprint
from dinokit.models import Backbone, TokenReads
from dinokit.models.head import LazyLogits, PrototypeHead
from dinokit.runtime.distributed import rank
from dinokit.train import checkpoint
from dinokit.train.checkpoint import MODEL
from dinokit.train.student_teacher import Network, StudentTeacher
from dinokit.weights import fill, load_backbone, save_backbone

START = "start.safetensors"  # in the run's folder


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
        if self.device != crops[0].device:
            self.device = crops[0].device
            for network in (self.backbone, self.heads):
                if network is not None:
                    _cast_as_autocast(network.to(self.device), self.device)
        return self.backbone.read(crops, masks, patches)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[LazyLogits, LazyLogits]:
        """As Network.logits(); for a teacher with heads."""
        assert self.heads is not None
        return self.heads.logits(cls, patches)


def read_frozen_teacher(recipe: Recipe) -> FrozenTeacher:
    """The teacher of `teacher.frozen`, checked against the crops and the student's heads.

    A run's folder with a checkpoint gives the heads too; of a run that distilled, the EMA is taken.

    Raises:
        LookupError: if there is no such file.
        ValueError: if it cannot be read, or does not fit the recipe.
    """
    source = Path(recipe.teacher.frozen)
    latest = checkpoint.latest(source / "checkpoints") if source.is_dir() else None
    network = _read_network(source, latest) if latest is not None else None
    backbone = load_backbone(source) if network is None else network.backbone
    _check_crops(recipe, backbone)
    if network is not None:
        _check_heads(recipe, network)
    return FrozenTeacher(backbone, network)


def init_weights(recipe: Recipe, model: StudentTeacher, resumes: bool) -> Recipe:
    """Fill student and EMA from the file of `backbone.weights`, before the first step.

    The positional embedding is resampled to the backbone's own grid (weights.fill); heads stay as they are.

    Args:
        recipe: of the run; names `backbone.weights`.
        model: new, on the CPU.
        resumes: whether the run has a checkpoint; then no weights are read.

    Returns:
        The recipe with the fingerprint of the filled backbone.

    Raises:
        LookupError, ValueError: as weights.fill, or if the weights are not those of the recipe's fingerprint.
    """
    source = recipe.backbone["weights"]
    saved = Path(recipe.run.out) / "recipe.yaml"
    recorded = str(load_recipe(saved, of_run=True).backbone.get("fingerprint", "")) if saved.exists() else ""
    if resumes:
        return _with_fingerprint(recipe, recorded)
    student, ema = model.student.backbone, model.ema.backbone
    fill(student, source, tolerate=["mask_token"])
    ema.load_state_dict(student.state_dict())
    filled = fingerprint(student)
    expected = recipe.backbone.get("fingerprint") or recorded
    if expected and expected != filled:
        raise ValueError(
            f"backbone.weights={source} gives a backbone of fingerprint {filled}, but the recipe was made "
            f"for {expected}: the file has changed, or the crops are of another size. Find the old file, or "
            f"choose another run.out and leave backbone.fingerprint out."
        )
    return _with_fingerprint(recipe, filled)


def save_start(out: Path, recipe: Recipe, backbone: Backbone) -> None:
    """Write the filled backbone, before the first step, into the run's folder."""
    if rank() == 0:
        save_backbone(out / START, backbone, recipe.architecture, to_yaml(recipe))


def _with_fingerprint(recipe: Recipe, value: str) -> Recipe:
    return replace(recipe, backbone={**recipe.backbone, "fingerprint": value})


def _cast_as_autocast(network: nn.Module, device: torch.device) -> None:
    """Store weights in the dtype that autocast would cast them to in every step: it saves half the memory."""
    if torch.is_autocast_enabled(device.type):
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.get_autocast_dtype(device.type))


def _read_network(run: Path, latest: checkpoint.SavedCheckpoint) -> Network:
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
    return network.eval().requires_grad_(False)


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
