"""Several frozen encoders side by side: their features of each place are concatenated.

Prismatic (arXiv 2402.07865) joins DINOv2 and SigLIP this way, Cambrian-1 (arXiv 2406.16860) also encoders of
different grids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config.registry import build as build_entry
from dinokit.models import Backbone, Tokens, check_blocks


@dataclass
class Config:
    of: list[dict[str, Any]] = field(default_factory=list)  # sections as `backbone`: name, weights ...
    channels: int = 3


class Joined(Backbone):
    """Encoders whose patches and class tokens are concatenated, in their order; there are no registers.

    The grid is that of the first one. Another encoder with another patch is shown the image in the nearest
    size of whole patches, and its map is resampled bilinearly to the first one's grid. Each gets images with
    its own mean and deviation. Blocks are counted from the last: layers() joins the last block of each, the
    one before it of each, and so on. Images are shown in the size that the first one was trained on.

    Args:
        parts: two encoders or more, of one number of channels.

    Raises:
        ValueError: if there are fewer, or their channels differ.
    """

    def __init__(self, parts: Sequence[Backbone]) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ValueError(f"backbone.of names {len(parts)} encoders: to join some, give two or more.")
        if len({part.channels for part in parts}) > 1:
            channels = ", ".join(str(part.channels) for part in parts)
            raise ValueError(
                f"backbone.of: the encoders take images of {channels} channels: give equal ones."
            )
        first = parts[0]
        self.parts = nn.ModuleList(parts)
        self.patch, self.channels, self.input = first.patch, first.channels, first.input
        self.width = sum(part.width for part in parts)
        self.frozen_only = "joined is for frozen encoders: train each of them alone"
        self.licence = "; ".join(dict.fromkeys(part.licence for part in parts if part.licence))
        mean, std = _columns(first)
        for i, part in enumerate(parts[1:], start=1):  # saved: another mean is part of what a file computes
            own_mean, own_std = _columns(part)
            self.register_buffer(f"scale{i}", std / own_std)
            self.register_buffer(f"shift{i}", (mean - own_mean) / own_std)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """Those of the first encoder, as many as every encoder has."""
        depth = min(len(self._part(i).blocks) for i in range(len(self.parts)))
        return nn.ModuleList(list(self._part(0).blocks)[len(self._part(0).blocks) - depth :])

    @property
    def has_layers(self) -> bool:
        """Whether each encoder has."""
        return all(self._part(i).has_layers for i in range(len(self.parts)))

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone.

        Raises:
            ValueError: for a mask.
        """
        if any(mask is not None for mask in masks):
            raise ValueError(f"masks are for training, and {self.frozen_only}.")
        return [self._join([part([x], [None])[0] for part, x in self._shown(crop)], crop) for crop in crops]

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """As Backbone; every encoder must define it.

        Raises:
            ValueError: if there is no such block in each, or an encoder gives its last block only.
        """
        depth = len(self.blocks)
        check_blocks(blocks, depth)
        found = []
        for part, x in self._shown(crops):
            found.append(part.layers(x, [len(part.blocks) - depth + i for i in blocks], norm))
        return [self._join(list(each), crops) for each in zip(*found, strict=True)]

    def _part(self, i: int) -> Backbone:
        part = self.parts[i]
        assert isinstance(part, Backbone)
        return part

    def _shown(self, crops: Tensor) -> list[tuple[Backbone, Tensor]]:
        """Each encoder and the images (b, C, h, w) that it is shown."""
        shown = [(self._part(0), crops)]
        for i in range(1, len(self.parts)):
            part = self._part(i)
            x = crops * getattr(self, f"scale{i}") + getattr(self, f"shift{i}")
            size = [max(round(side / part.patch), 1) * part.patch for side in x.shape[2:]]
            if size != list(x.shape[2:]):
                x = F.interpolate(x.float(), size, mode="bilinear", antialias=True)
            shown.append((part, x))
        return shown

    def _join(self, tokens: Sequence[Tokens], crops: Tensor) -> Tokens:
        grid = [side // self.patch for side in crops.shape[2:]]
        maps = []
        for i, each in enumerate(tokens):
            patches, patch = each.patches, self._part(i).patch
            own = [max(round(side / patch), 1) for side in crops.shape[2:]]
            if own != grid:
                map_ = patches.transpose(1, 2).unflatten(2, own)
                map_ = F.interpolate(map_.float(), grid, mode="bilinear", antialias=True)  # not in 16 bits
                patches = map_.flatten(2).transpose(1, 2)
            maps.append(patches)
        joined = torch.cat(maps, dim=2)
        return Tokens(torch.cat([each.cls for each in tokens], dim=1), joined[:, :0], joined)


def _columns(part: Backbone) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (C, 1, 1)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (part.input.mean, part.input.std))
    return mean, std


def build(cfg: Config) -> Joined:
    """Encoders with the weights that their own code gives them; dinokit.weights.build_section reads files."""
    return Joined([_built(section, cfg.channels) for section in cfg.of])


def _built(section: Mapping[str, Any], channels: int) -> Backbone:
    if section.get("weights"):
        raise ValueError("backbone.of: weights are read by dinokit.weights.build_section(), not here.")
    part = build_entry("models", {"channels": channels, **section})
    assert isinstance(part, Backbone)
    return part
