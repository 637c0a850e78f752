"""Faster forms of blocks, ViTs and prototypes, with the same results in less time or memory.

The trainer installs them; without install(), networks compute what block.py, vit.py and head.py say.
tests/models/test_fused.py compares each with the plain form, in values and gradients:

    GELU             computed again in the backward pass: its result is a block's largest tensor
    LayerScale       multiplied into the weights of the layer before it: one pass less over its output
    stochastic depth computed only for the images that keep the branch
    last block       computed only for the tokens that the losses read
    attention        as two plain products where images are short, on a CPU
    prototypes       normalised by PyTorch's own kernel

A block with a hook or with a replaced layer, such as an adapter, is computed in its plain form.

    T  rows: the tokens of all images      D  width      M  masked patches
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import TokenReads
from dinokit.models.attention import (
    Attention,
    DropPath,
    Kernel,
    LayerScale,
    MaskedBiasLinear,
    Mlp,
    PackedBatch,
    SplitSwiGLU,
    SwiGLU,
    split_heads,
)
from dinokit.models.attention import attend as plain_attend
from dinokit.models.block import Block
from dinokit.models.head import Prototypes
from dinokit.models.vit import VisionTransformer

SHORT = 256  # tokens of an image
_KINDS = {
    Attention, Mlp, SwiGLU, SplitSwiGLU, LayerScale, DropPath, nn.LayerNorm, nn.Linear, MaskedBiasLinear,
    nn.Identity,
}  # fmt: skip


def install(network: nn.Module, read_rows: bool = True) -> None:
    """Let the modules of a network compute the faster forms, in place; parameters stay as they are.

    Args:
        network: a backbone, a head, or what contains them.
        read_rows: whether read() of a ViT computes the last block only for the tokens that it returns.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.forward = MethodType(forward_block, module)  # type: ignore[method-assign]
        elif isinstance(module, Prototypes):
            module.forward = MethodType(forward_prototypes, module)  # type: ignore[method-assign]
        elif isinstance(module, VisionTransformer) and read_rows:
            module.read = MethodType(read_tokens, module)  # type: ignore[method-assign]


def reads_rows(backbone: nn.Module) -> bool:
    """Whether read() of a backbone computes its last block only for the tokens that it returns."""
    return "read" in vars(backbone)


def forward_block(block: Block, x: Tensor, batch: PackedBatch, read: Tensor | None = None) -> Tensor:
    """Block.forward(): (T, D) -> (T, D); or only the rows `read` (t,) of it, (t, D)."""
    if not _is_unchanged(block):
        x = Block.forward(block, x, batch)
        return x if read is None else x.index_select(0, read)
    if read is not None:
        return _forward_rows(block, x, batch, read)
    x = _residual(x, batch, block.drop_path, lambda rows, part: _attention(block, rows, part))
    return _residual(x, batch, block.drop_path, lambda rows, _: _feed_forward(block, rows))


def read_tokens(
    vit: VisionTransformer, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Tensor
) -> TokenReads:
    """Backbone.read() of a ViT: the last block computes the class tokens and the read patches alone."""
    rows, batch = vit.embed(crops, masks)
    for block in vit.blocks[:-1]:
        rows = block(rows, batch)
    tokens, first = batch.groups[0][1], 1 + vit.registers
    grid = tokens - first  # N
    places = patches // grid * tokens + first + patches % grid
    read = torch.cat([batch.starts(rows.device)[:-1].long(), places])
    rows = vit.norm(vit.blocks[-1](rows, batch, read))
    *cls, of_patches = rows.split([*(images for images, _ in batch.groups), len(patches)])
    return TokenReads(cls, of_patches)


def forward_prototypes(prototypes: Prototypes, dtype: torch.dtype) -> Tensor:
    """Prototypes.forward() by the kernel behind torch.nn.utils.parametrizations.weight_norm."""
    return torch._weight_norm(prototypes.weight_v, prototypes.weight_g, 0).to(dtype)


def attend(qkv: Tensor, heads: int, batch: PackedBatch, kernel: Kernel = "auto") -> Tensor:
    """attention.attend(), and with `auto` two plain products where images are short, on a CPU.

    The backward pass of PyTorch's CPU kernel is made for long sequences: at 17 to 197 tokens in bf16 the
    products took a fifth of its time on a machine with AVX-512, and their attention weights are small.
    """
    longest = max(tokens for _, tokens in batch.groups)
    if kernel == "auto" and qkv.device.type == "cpu" and longest <= SHORT:
        attended: Tensor = _ShortAttention.apply(qkv, heads, batch)
        return attended
    return plain_attend(qkv, heads, batch, kernel)


def scaled_linear(x: Tensor, linear: nn.Module, scale: nn.Module, gelu: bool = False) -> Tensor:
    """scale(linear(x)), or scale(linear(gelu(x))): (T, I) -> (T, O).

    The gain is multiplied into the weights, which are few beside the rows. Not in fp16: a gain of 1e-5 brings
    weights below its smallest number.
    """
    known = type(linear) is nn.Linear and type(scale) in (LayerScale, nn.Identity)
    if not known or not torch.is_grad_enabled() or x.dtype == torch.float16:
        out: Tensor = scale(linear(F.gelu(x) if gelu else x))
        return out
    assert isinstance(linear, nn.Linear)
    weight: Tensor = linear.weight
    bias: Tensor = linear.bias
    if isinstance(scale, LayerScale):
        weight, bias = weight * scale.gamma[:, None], bias * scale.gamma
    if not gelu:
        return F.linear(x, weight, bias)
    result: Tensor = _GeluLinear.apply(x, weight.to(x.dtype), bias.to(x.dtype))
    return result


def _is_unchanged(block: Block) -> bool:
    """Whether all modules of a block are ours and without hooks, so that some need not be called."""
    modules = (module for child in block.children() for module in child.modules())
    return all(type(module) in _KINDS and not _has_hooks(module) for module in modules)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _attention(block: Block, x: Tensor, batch: PackedBatch, read: Tensor | None = None) -> Tensor:
    attn = block.attn
    attended = attend(attn.project(block.norm1(x), batch), attn.heads, batch, attn.kernel)
    return scaled_linear(attended if read is None else attended.index_select(0, read), attn.proj, block.ls1)


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    x = block.norm2(x)
    if isinstance(block.mlp, Mlp):
        return scaled_linear(block.mlp.fc1(x), block.mlp.fc2, block.ls2, gelu=True)
    if isinstance(block.mlp, SplitSwiGLU):
        x1, x2 = block.mlp.w1(x), block.mlp.w2(x)
    else:
        assert isinstance(block.mlp, SwiGLU)
        x1, x2 = block.mlp.w12(x).chunk(2, dim=-1)
    return scaled_linear(F.silu(x1) * x2, block.mlp.w3, block.ls2)


def _forward_rows(block: Block, x: Tensor, batch: PackedBatch, read: Tensor) -> Tensor:
    # All rows are keys and values; the rest is computed for the rows `read`. Stochastic depth multiplies by
    # zero here: to leave rows out, the CPU would have to wait for their number.
    def drop(branch: Tensor) -> Tensor:
        dropping = block.drop_path
        return branch * dropping.factors(batch, x.device)[read] if dropping.active else branch

    rows = x.index_select(0, read)
    rows = rows + drop(_attention(block, x, batch, read))
    return rows + drop(_feed_forward(block, rows))


def _residual(
    x: Tensor, batch: PackedBatch, drop_path: DropPath, branch: Callable[[Tensor, PackedBatch], Tensor]
) -> Tensor:
    """X + drop_path(branch(x, batch), batch), the branch computed only for the images that keep it."""
    if not drop_path.active:
        return x + branch(x, batch)
    index, scale, groups, start = [], [], [], 0
    for (images, tokens), chosen in zip(batch.groups, drop_path.draw(batch, x.device), strict=True):
        token = torch.arange(start, start + tokens, device=x.device)
        index.append((chosen[:, None] * tokens + token).flatten())
        scale.append(torch.full((len(chosen) * tokens, 1), images / len(chosen), device=x.device))
        groups.append((len(chosen), tokens))
        start += images * tokens
    places = torch.cat(index)  # the rows that are computed
    out = branch(x.index_select(0, places), PackedBatch(tuple(groups), batch.rotations)) * torch.cat(scale)
    return x.index_add(0, places, out.to(x.dtype))


class _GeluLinear(torch.autograd.Function):
    """A GELU costs a hundredth of the product that follows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = grad.T @ F.gelu(x)
        return torch.ops.aten.gelu_backward(grad @ weight, x), grad_weight, grad.sum(dim=0)


class _ShortAttention(torch.autograd.Function):
    """Softmax attention as two products for each group, its results written in place without a copy."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, batch: PackedBatch) -> Tensor:
        out, saved = qkv.new_empty(len(qkv), qkv.shape[1] // 3), []
        for group, of_group in zip(batch.split(qkv), batch.split(out), strict=True):
            split = split_heads(group, 3, heads).contiguous()
            q, k, v = split.flatten(1, 2)  # (images * H, tokens, d) each
            with torch.autocast(q.device.type, enabled=False):  # else the softmax would be in float32
                scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
                weights = scores.softmax(dim=-1)
            split_heads(of_group, 1, heads).copy_(torch.bmm(weights, v).view(1, *split.shape[1:]))
            saved += [split, weights]
        ctx.save_for_backward(*saved)
        ctx.heads, ctx.batch = heads, batch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        heads, batch, saved = ctx.heads, ctx.batch, iter(ctx.saved_tensors)
        grad_qkv = grad.new_empty(len(grad), 3 * grad.shape[1])
        for grad_out, of_group in zip(batch.split(grad), batch.split(grad_qkv), strict=True):
            split, weights = next(saved), next(saved)
            q, k, v = split.flatten(1, 2)
            grad_heads, grad_split = split_heads(grad_out, 1, heads).flatten(0, 2), torch.empty_like(split)
            dq, dk, dv = grad_split.flatten(1, 2)
            torch.bmm(weights.mT, grad_heads, out=dv)
            grad_weights = torch.bmm(grad_heads, v.mT)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            scale = q.shape[-1] ** -0.5
            torch.baddbmm(dq, grad_scores, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(dk, grad_scores.mT, q, beta=0, alpha=scale, out=dk)
            split_heads(of_group, 3, heads).copy_(grad_split)
        return grad_qkv, None, None
