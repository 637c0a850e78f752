"""The projection head: an MLP, the unit sphere, and K prototypes (DINO, arXiv 2104.14294, appendix C)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits in memory at a time. On a CPU they and what is made of them stay in the cache; on a GPU each kernel
# is long enough to hide its launch.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**26


@dataclass
class LazyLogits:
    """Prototype logits that are not computed yet: rows on the unit sphere, and what meets them there."""

    rows: Tensor  # (..., w)
    prototypes: Tensor  # (K, w)

    def by_crop(self, images: int) -> "LazyLogits":
        """The rows (crops * images, w), crop after crop, as (crops, images, w)."""
        return LazyLogits(self.rows.unflatten(0, (-1, images)), self.prototypes)

    def detach(self) -> "LazyLogits":
        """The same, without a gradient."""
        return LazyLogits(self.rows.detach(), self.prototypes.detach())

    def logits(self, part: slice = slice(None)) -> Tensor:
        """Logits (..., K) of all prototypes, or of a part of them."""
        return F.linear(self.rows, self.prototypes[part])


def slices(*scores: LazyLogits) -> list[slice]:
    """The prototypes, which these have alike, in slices whose logits are few for whoever has most rows."""
    rows = max(s.rows.shape[:-1].numel() for s in scores)
    return _chunks(len(scores[0].prototypes), rows, scores[0].rows.device)


def _chunks(count: int, width: int, device: torch.device) -> list[slice]:
    step = max((CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // max(width, 1), 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Unit(torch.autograd.Function):
    """weight_norm into another dtype, a slice at a time: no copy of all prototypes in float32."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        done, lengths = torch.empty_like(v, dtype=dtype), []
        for part in _chunks(len(v), v.shape[1], v.device):
            done[part], length = torch._weight_norm_interface(v[part], g[part], 0)
            lengths.append(length)  # in float32 even of half precision
        ctx.save_for_backward(v, g, torch.cat(lengths))
        return done

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        v, g, length = ctx.saved_tensors
        grad_v, grad_g = torch.empty_like(v), torch.empty_like(g)
        back = torch.ops.aten._weight_norm_interface_backward
        for part in _chunks(len(v), v.shape[1], v.device):
            grad_v[part], grad_g[part] = back(grad[part].to(v.dtype), v[part], g[part], length[part], 0)
        return grad_v, grad_g, None


class Prototypes(nn.Module):
    """K vectors; each has a direction `weight_v` and a length `weight_g`, 1 at first."""

    def __init__(self, width: int, count: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        # PyTorch's own start of a linear layer, as in DINO: the MLP's trunc-normal one is not applied here.
        nn.init.uniform_(self.weight_v, -(width**-0.5), width**-0.5)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """(count, width)."""
        done: Tensor = _Unit.apply(self.weight_v, self.weight_g, dtype)
        return done


class PrototypeHead(nn.Module):
    """From features to prototype scores; parameter names as in DINO's and DINOv2's checkpoints.

    Args:
        width: D, of the backbone.
        prototypes: K.
        hidden: width of the MLP.
        bottleneck: w, width of the sphere that the prototypes lie on.
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

    def forward(self, x: Tensor) -> LazyLogits:
        """(..., D) -> the scores of (..., w), in the dtype that the MLP computes in."""
        x = self.mlp(x)
        unit = F.normalize(x.float(), dim=-1)  # in half precision the least length would be zero
        return LazyLogits(unit.to(x.dtype), self.last_layer(x.dtype))
