"""Which numbers are kept of what a backbone says of an image: one row of them an image."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dinokit.features.frozen import last_layers
from dinokit.models import Backbone

GEM_POWER, GEM_LEAST = 4.0, 1e-6  # of DINO's copy detection


@dataclass(frozen=True)
class Reading:
    """Class tokens of the last blocks, in the order of depth, then the patches of the last block, pooled.

    With blocks=4 and pool='mean' that is the input of the released four-block classifiers (DINOv2, arXiv
    2304.07193, appendix B.3); any fewer of these blocks are the columns to its right.
    """

    blocks: int = 1  # class tokens of so many last blocks
    pool: Literal["none", "mean", "gem"] = (
        "none"  # gem: the generalised mean, fourth power (arXiv 1711.02512)
    )

    def width(self, backbone: Backbone) -> int:
        """Numbers an image."""
        return backbone.width * (self.blocks + (self.pool != "none"))

    def __call__(self, backbone: Backbone, crops: Tensor) -> Tensor:
        """Normalised crops (b, C, h, w) -> (b, width) float32.

        Raises:
            ValueError: if the backbone shows fewer blocks, or gives no patches to pool.
        """
        layers = last_layers(backbone, crops, self.blocks)
        parts = [tokens.cls.float() for tokens in layers]
        if self.pool != "none":
            patches = layers[-1].patches.float()
            if not patches.shape[1]:
                raise ValueError(f"{type(backbone).__name__} gives no patches that could be pooled.")
            parts.append(patches.mean(dim=1) if self.pool == "mean" else generalised_mean(patches))
        return torch.cat(parts, dim=1)


def generalised_mean(patches: Tensor) -> Tensor:
    """GeM: the mean of the fourth powers of what is positive, rooted. (b, N, D) -> (b, D)."""
    return patches.clamp(min=GEM_LEAST).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)
