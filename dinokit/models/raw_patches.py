"""The pixels of each patch, averaged to a few: a baseline for dense features. It has no parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import Backbone, Input, Tokens


@dataclass
class Config:
    channels: int = 3
    size: int = 224  # pixels: the side of its input images
    patch: int = 16  # pixels
    cell: int = 4  # pixels: the side to which a patch is averaged


class RawPatches(Backbone):
    """Features are averaged pixels, centred at mid-grey; the class token is their mean. No blocks."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.patch % cfg.cell or cfg.size % cfg.patch:
            raise ValueError(
                f"backbone.patch={cfg.patch} must be a multiple of backbone.cell={cfg.cell}, and "
                f"backbone.size={cfg.size} one of the patch."
            )
        self.patch, self.channels, self.cell = cfg.patch, cfg.channels, cfg.cell
        self.width = cfg.channels * cfg.cell**2
        self.blocks = nn.ModuleList()
        self.input = Input(cfg.size, (0.5,) * cfg.channels, (1.0,) * cfg.channels)
        self.register_buffer("nothing", torch.zeros(()), persistent=False)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone; a mask has no effect."""
        tokens = []
        for x in crops:
            small = F.avg_pool2d(x, self.patch // self.cell)
            patches = F.unfold(small, self.cell, stride=self.cell).transpose(1, 2)  # (b, N, D)
            tokens.append(Tokens(patches.mean(dim=1), patches[:, :0], patches))
        return tokens


build = RawPatches
