"""The tensors of a file in a backbone that is there already, of another image size perhaps."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dinokit.backbones import Backbone
from dinokit.backbones.vit import interpolate_grid
from dinokit.weights import load_backbone


def fill(backbone: Backbone, source: str | Path, *, tolerate: Sequence[str] = ()) -> None:
    """Put the tensors of a file into a backbone, in place."""
    other = load_backbone(source)
    assert isinstance(backbone, nn.Module)
    assert isinstance(other, nn.Module)
    own, tensors = backbone.state_dict(), other.state_dict()
    if "pos_embed" in own:
        position = tensors["pos_embed"]
        side, new = (round((x.shape[1] - 1) ** 0.5) for x in (position, own["pos_embed"]))
        if side != new:
            grid = position[:, 1:].unflatten(1, (side, side))
            grid = interpolate_grid(grid, new, new, 0.1, False)
            tensors["pos_embed"] = torch.cat([position[:, :1], grid.flatten(1, 2)], dim=1)
    shapes = {k: v.shape for k, v in own.items()}
    if {k: v.shape for k, v in tensors.items()} != shapes:
        raise ValueError(f"{source} does not fit the backbone to fill.")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
