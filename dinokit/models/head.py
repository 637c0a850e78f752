"""Heads: the projection head with prototypes of DINO (arXiv 2104.14294, appendix C), and a projector."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANCE_EPS = 1e-5  # as in batch norm


@dataclass
class LazyLogits:
    """Prototype logits that are not computed yet: their rows of unit length and the prototypes."""

    rows: Tensor  # (..., w)
    prototypes: Tensor  # (K, w)

    def by_crop(self, images: int) -> "LazyLogits":
        """The rows (crops * images, w), crop after crop, as (crops, images, w)."""
        return LazyLogits(self.rows.unflatten(0, (-1, images)), self.prototypes)

    def detach(self) -> "LazyLogits":
        """The same, without a gradient."""
        return LazyLogits(self.rows.detach(), self.prototypes.detach())

    def logits(self, part: slice = slice(None)) -> Tensor:
        """Logits (..., K) of all prototypes, or (..., k) of a slice of them."""
        return F.linear(self.rows, self.prototypes[part])


class Prototypes(nn.Module):
    """K vectors with weight normalisation: a direction `weight_v` and a length `weight_g`, initially 1."""

    def __init__(self, width: int, count: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        # The initialisation of nn.Linear, as in DINO: that of the MLP is not applied here.
        nn.init.uniform_(self.weight_v, -(width**-0.5), width**-0.5)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The vectors (count, width) in a dtype."""
        return (F.normalize(self.weight_v, dim=1) * self.weight_g).to(dtype)


class PrototypeHead(nn.Module):
    """Features to prototype logits; parameter names as in DINO's and DINOv2's checkpoints.

    Args:
        width: D, of the backbone.
        prototypes: K.
        hidden: width of the MLP.
        bottleneck: w, width of the sphere that the prototypes lie on.
        layers: linear layers before the prototypes.
        norm_last_layer: keep the length of every prototype at 1.
        standardize: give each feature the mean 0 and the deviation 1 over the rows, before the MLP. After a
            contrast the class tokens of all images are nearly alike. Without this the head begins with nearly
            one output for every image, and its targets do not tell images apart (docs/small_data.md).
    """

    def __init__(
        self, width: int, prototypes: int, hidden: int, bottleneck: int, layers: int, norm_last_layer: bool,
        standardize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.standardize = standardize
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        layers_of_mlp: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers_of_mlp += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*layers_of_mlp[:-1]) if layers > 1 else layers_of_mlp[0]
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)

    def forward(self, x: Tensor) -> LazyLogits:
        """Features (..., D) to logits with rows (..., w), in the dtype that the MLP computes in."""
        x = self.mlp(standardized(x) if self.standardize else x)
        unit = F.normalize(x.float(), dim=-1)  # in half precision the smallest length would be 0
        return LazyLogits(unit.to(x.dtype), self.last_layer(x.dtype))


def standardized(x: Tensor) -> Tensor:
    """Features (..., D) with mean 0 and deviation 1 over the rows of this process; the same dtype.

    As batch norm without parameters and running averages; a single row becomes 0.
    """
    rows = x.float().flatten(0, -2)
    rows = rows - rows.mean(dim=0)
    return (rows / (rows.square().mean(dim=0) + VARIANCE_EPS).sqrt()).to(x.dtype).view(x.shape)


class Projector(nn.Sequential):
    """Features (R, D) to projections (R, P): linear layers with batch norm and GELU between them.

    Batch norm uses the rows of one forward pass in one process, in training as in evaluation: a projector
    exists in training alone.

    Args:
        width: D.
        hidden: width between the layers.
        output: P.
        layers: linear layers.
    """

    def __init__(self, width: int, hidden: int, output: int, layers: int) -> None:
        widths = [width, *[hidden] * (layers - 1), output]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            norm = nn.BatchNorm1d(after, track_running_stats=False)
            modules += [nn.Linear(before, after), norm, nn.GELU()]
        super().__init__(*modules[:-2])
