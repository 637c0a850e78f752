"""The last linear layer of a branch, which writes and keeps less than its operations one by one.

T  rows      I, O  channels in and out
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerScale(nn.Module):
    """A gain a channel, near zero at the start (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, rows: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return rows * self.gamma


def project(x: Tensor, linear: nn.Linear, scale: LayerScale | None, gelu: bool = False) -> Tensor:
    """scale(linear(x)), or scale(linear(gelu(x))).

    For training, the gain is taken into the weights, because rows are many: one pass over (T, O) less
    forward, three less backward, and (T, O) is not kept. The modules are called as they are without a
    gradient (an export and hooks want to see them), in fp16 (a gain of 1e-5 takes weights below its least
    number), and if something else stands in the place of the layer, an adapter say.

    Args:
        x: (T, I).
        linear: I to O, with a bias.
        scale: a gain (O,), or None for 1.
        gelu: whether x goes through a GELU first; x alone is kept for the backward pass, and not gelu(x).

    Returns:
        (T, O).
    """
    if not torch.is_grad_enabled() or x.dtype == torch.float16 or type(linear) is not nn.Linear:
        out = linear(F.gelu(x) if gelu else x)
        return out if scale is None else scale(out)
    weight: Tensor = linear.weight
    bias: Tensor = linear.bias
    if scale is not None:
        weight, bias = weight * scale.gamma[:, None], bias * scale.gamma
    if not gelu:
        return F.linear(x, weight, bias)
    done: Tensor = _GeluLinear.apply(x, weight.to(x.dtype), bias.to(x.dtype))
    return done


class _GeluLinear(torch.autograd.Function):
    """A GELU costs a hundredth of the product that follows; its result is a block's largest tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = grad.T @ F.gelu(x)
        return torch.ops.aten.gelu_backward(grad @ weight, x), grad_weight, grad.sum(dim=0)
