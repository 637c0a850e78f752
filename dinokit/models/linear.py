"""The first and the last linear layer of a branch, which keep less than their operations one by one.

What is left out is computed again in the backward pass, for a small part of the product that it meets there.
The modules are called as they are without a gradient (an export wants to see them), if somebody has hooks on
them, and if something else stands in the place of a layer, an adapter say.

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


def is_bare(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is none, or what its kind says and without hooks: its call may be done elsewhere."""
    return module is None or (type(module) is kind and not is_hooked(module))


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody sees or changes what goes through a module, forward or backward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def after_norm(x: Tensor, norm: nn.LayerNorm | None, linear: nn.Linear) -> Tensor:
    """linear(norm(x)); for training, norm(x) is not kept.

    Args:
        x: (T, I).
        norm: over I channels, with gains and shifts; None: linear(x).
        linear: I to O, with a bias.

    Returns:
        (T, O).
    """
    if norm is None:
        return linear(x)
    if not torch.is_grad_enabled() or not is_bare(norm, nn.LayerNorm) or not is_bare(linear, nn.Linear):
        return linear(norm(x))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    gain, shift = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    done: Tensor = _NormLinear.apply(x, gain, shift, norm.eps, linear.weight, linear.bias, dtype)
    return done


def project(x: Tensor, linear: nn.Linear, scale: LayerScale | None, gelu: bool = False) -> Tensor:
    """scale(linear(x)), or scale(linear(gelu(x))).

    For training, the gain is taken into the weights, because rows are many: one pass over (T, O) less
    forward, three less backward, and (T, O) is not kept. In fp16 the modules are called as they are: a gain
    of 1e-5 takes weights below its least number.

    Args:
        x: (T, I).
        linear: I to O, with a bias.
        scale: a gain (O,), or None for 1.
        gelu: whether x goes through a GELU first; x alone is kept for the backward pass, and not gelu(x).

    Returns:
        (T, O).
    """
    bare = is_bare(linear, nn.Linear) and is_bare(scale, LayerScale)
    if not torch.is_grad_enabled() or x.dtype == torch.float16 or not bare:
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


class _NormLinear(torch.autograd.Function):
    """A layer norm costs a hundredth of the product that follows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain, shift, eps)
        ctx.save_for_backward(x, gain, shift, weight, mean, rstd)
        ctx.eps, ctx.dtype = eps, dtype
        return F.linear(out.to(dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight, mean, rstd = ctx.saved_tensors
        out = torch.native_layer_norm(x, x.shape[-1:], gain, shift, ctx.eps)[0].to(ctx.dtype)
        grad_x, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
            (grad @ weight.to(ctx.dtype)).to(x.dtype),
            x, x.shape[-1:], mean, rstd, gain, shift, [True, True, True],
        )  # fmt: skip
        return grad_x, grad_gain, grad_shift, None, grad.T @ out, grad.sum(dim=0), None
