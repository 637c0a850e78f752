"""A frozen backbone as a vision tower of transformers: the same tokens, in a class that anyone can open."""

from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from dinokit.language import needed
from dinokit.models import Backbone, Input
from dinokit.models.dinov3 import DINOv3
from dinokit.models.raw_patches import RawPatches
from dinokit.models.vit import VisionTransformer, interpolate_grid
from dinokit.weights.formats import export


@dataclass
class Tower:
    """A vision model of transformers, and what its images and tokens are."""

    model: Any  # a Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel, frozen
    input: Input  # side in pixels, mean and deviation of the images
    patch: int  # pixels
    registers: int  # tokens between the class token and the patches
    layer: int  # the entry of hidden_states that is shown, from the end


def tower_of(backbone: Backbone, size: int, layer: int) -> Tower:
    """The tower of a backbone.

    Its hidden states are those before the final norm: entry -1 is `backbone.layers([depth - 1], norm=False)`.

    Args:
        backbone: a vit, dinov3 or raw_patches.
        size: pixels, the side of its images; 0: that of its own grid. Positions of a vit are resampled by the
            backbone's own rule.
        layer: entry of the hidden states; of raw_patches it is always the first, their pixels.

    Raises:
        ValueError: for another backbone, or sizes that do not fit; it says what to do.
    """
    transformers = needed("transformers")
    if backbone.channels != 3:
        raise ValueError(
            f"The backbone takes {backbone.channels} channels; a model that answers is shown RGB images."
        )
    size = size or _own_size(backbone)
    if size % backbone.patch:
        raise ValueError(f"view.size={size} is no multiple of the backbone's patch, {backbone.patch} pixels.")
    if isinstance(backbone, RawPatches):
        return _raw(backbone, size)
    depth = len(backbone.blocks)
    if not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"view.layer={layer}: the backbone has {depth} blocks, so it is -{depth + 1} to {depth}."
        )
    if not isinstance(backbone, VisionTransformer | DINOv3):
        raise ValueError(
            f"The backbone is a {type(backbone).__name__}, for which transformers' Llava classes have no "
            f"tower. Give a vit or a dinov3 (weights of DINO, DINOv2 or DINOv3, or a run of dinokit train), "
            f"or backbone.name=raw_patches for the baseline."
        )
    shown = _at_size(backbone, size)
    with TemporaryDirectory() as folder:
        list(export(shown, "hf", Path(folder) / "tower"))
        model = transformers.AutoModel.from_pretrained(Path(folder) / "tower", local_files_only=True)
    model.config.image_size = size
    from_end = layer if layer < 0 else layer - depth - 1  # transformers 5 takes the entry 0 for "none"
    return Tower(_frozen(model), shown.input, backbone.patch, backbone.registers, from_end)


def _own_size(backbone: Backbone) -> int:
    if isinstance(backbone, VisionTransformer):
        return backbone.side * backbone.patch
    return backbone.input.size - backbone.input.size % backbone.patch


def _at_size(backbone: Any, size: int) -> Any:
    """A copy of a backbone whose stored grid of positions is that of images of this size."""
    copy = deepcopy(backbone).cpu().float().eval()
    copy.input = Input(size, copy.input.mean, copy.input.std)
    side = size // backbone.patch
    if isinstance(backbone, VisionTransformer) and side != backbone.side:
        old = copy.pos_embed.detach()
        grid = old[:, 1:].unflatten(1, (copy.side, copy.side))
        grid = interpolate_grid(grid, side, side, copy.offset, copy.antialias)
        copy.pos_embed = nn.Parameter(torch.cat([old[:, :1], grid.flatten(1, 2)], dim=1))
        copy.side = side
    return copy


def _raw(backbone: RawPatches, size: int) -> Tower:
    """Pixels of patches as the embeddings of a Dinov2Model whose one block nothing reads.

    The projection averages cells of pixels as the backbone does, so the first hidden state is equal.
    """
    transformers = import_module("transformers")
    config = transformers.Dinov2Config(
        hidden_size=backbone.width, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=1,
        image_size=size, patch_size=backbone.patch,
    )  # fmt: skip
    model = transformers.Dinov2Model(config)
    side = backbone.patch // backbone.cell  # pixels of a cell
    places = torch.eye(backbone.width).view(backbone.width, 3, backbone.cell, backbone.cell)
    kernel = places.repeat_interleave(side, 2).repeat_interleave(side, 3) / side**2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embeddings.patch_embeddings.projection.weight.copy_(kernel)
    shown = Input(size, backbone.input.mean, backbone.input.std)
    return Tower(_frozen(model), shown, backbone.patch, 0, -2)


def _frozen(model: Any) -> Any:
    return model.float().eval().requires_grad_(False)
