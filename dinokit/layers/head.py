"""The projection head: an MLP, the unit sphere, and K prototypes (DINO, arXiv 2104.14294, appendix C)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A linear layer without bias; its rows have a direction `weight_v` and a length `weight_g`, 1 at first.

    With inputs on the unit sphere the outputs are cosines, times the lengths.
    """

    def __init__(self, width: int, count: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        # PyTorch's own start of a linear layer, as in DINO: the MLP's trunc-normal one is not applied here.
        nn.init.uniform_(self.weight_v, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., count)."""
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class PrototypeHead(nn.Module):
    """From features to prototype logits; parameter names as in DINO's and DINOv2's checkpoints.

    Args:
        width: D, of the backbone.
        prototypes: K.
        hidden: width of the MLP.
        bottleneck: width of the sphere that the prototypes lie on.
        layers: linear layers before the prototypes.
        norm_last_layer: hold the length of every prototype at 1.
    """

    def __init__(
        self, width: int, prototypes: int, hidden: int, bottleneck: int, layers: int, norm_last_layer: bool
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            steps += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1]) if layers > 1 else steps[0]
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12  # 1e-12 is zero in half precision
        return self.last_layer(F.normalize(x, dim=-1, eps=eps))
