"""The image itself, averaged to a few pixels: a baseline for class features. It has no parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import Backbone, Input, Tokens


@dataclass
class Config:
    channels: int = 3
    size: int = 64  # pixels: the side of its input images
    grid: int = 16  # pixels: the side to which an image is averaged


class Pixels(Backbone):
    """Features are the pixels of the averaged image, centred at mid-grey; no patches, no blocks."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.grid, self.channels, self.patch = cfg.grid, cfg.channels, 1
        self.width = cfg.channels * cfg.grid**2
        self.blocks = nn.ModuleList()
        self.input = Input(cfg.size, (0.5,) * cfg.channels, (1.0,) * cfg.channels)
        self.register_buffer("nothing", torch.zeros(()), persistent=False)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone; a mask has no effect."""
        tokens = []
        for x in crops:
            cls = F.adaptive_avg_pool2d(x, self.grid).flatten(1)
            none = cls.new_zeros(len(cls), 0, self.width)
            tokens.append(Tokens(cls=cls, registers=none, patches=none))
        return tokens


build = Pixels
