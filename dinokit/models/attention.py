"""Attention over crops of different sizes in one pass; the only file that knows an attention kernel.

The tokens of a step are laid end to end as rows, and a PackedBatch remembers which rows are one image. Norms,
MLPs and residuals work row by row and never ask; only attend() does.

    T  rows: the sum over groups of images * tokens      H  attention heads
    D  width of the model                                d  width of one head, D / H

All kernels give the same numbers (tests/models/test_attention.py):

    auto      sdpa; on a CPU, two plain products where images are short
    sdpa      torch's scaled_dot_product_attention, one call a group: five to ten times faster on a CPU than
              nested tensors or a block-diagonal mask
    xformers  memory_efficient_attention over all rows with a block-diagonal mask; CUDA
    varlen    torch's varlen_attn over all rows; CUDA, bf16 or fp16
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models.linear import LayerScale, after_norm, project


@dataclass(frozen=True)
class PackedBatch:
    """How rows (T, D) are made of groups of images with equally many tokens."""

    groups: tuple[tuple[int, int], ...]  # (images, tokens an image) of each group, in the order of the rows

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows (T, D) as one (images, tokens, D) a group; views, no copies."""
        parts = rows.split([images * tokens for images, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def starts(self, device: torch.device) -> Tensor:
        """The row where each image begins, and the number of rows: (images + 1,) int32."""
        parts, row = [], 0
        for images, tokens in self.groups:
            parts.append(torch.arange(row, row + images * tokens, tokens, dtype=torch.int32, device=device))
            row += images * tokens
        return torch.cat([*parts, torch.full((1,), row, dtype=torch.int32, device=device)])


Kernel = Literal["auto", "sdpa", "xformers", "varlen"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


def attend(qkv: Tensor, heads: int, segments: PackedBatch, kernel: Kernel = "auto") -> Tensor:
    """Softmax attention inside each image, never across two.

    Args:
        qkv: (T, 3 * D), queries, keys and values of each row; within each, head after head.
        heads: H.
        segments: which rows are one image.
        kernel: what computes it.

    Returns:
        (T, D), before the output projection.
    """
    if kernel in ("xformers", "varlen"):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # (T, H, d) each
        return (_xformers if kernel == "xformers" else _varlen)(q, k, v, segments).flatten(1)
    if kernel == "auto" and _is_short(qkv, segments):
        short: Tensor = _Short.apply(qkv, heads, segments)
        return short
    if len(segments.groups) == 1:
        q, k, v = _by_head(segments.split(qkv)[0], 3, heads).contiguous()  # (images, H, tokens, d) each
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    alone = zip(segments.split(qkv), segments.groups, strict=True)
    return torch.cat([attend(x.flatten(0, 1), heads, PackedBatch((group,)), kernel) for x, group in alone])


def why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel cannot compute here, found out by trying; empty if it can."""
    if kernel in ("auto", "sdpa"):
        return ""
    if device.type != "cuda":
        return f"it needs CUDA, and this is {device.type}"
    try:
        x = torch.zeros(16, 3 * 32, device=device, dtype=dtype, requires_grad=True)
        attend(x, 1, PackedBatch(((2, 8),)), kernel).sum().backward()
    except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def use_kernel(network: nn.Module, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    """Let every attention of a network be computed by a kernel.

    Raises:
        ValueError: if it cannot be, here or in this network.
    """
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    if kernel != "auto" and not layers:
        raise ValueError(
            f"run.attention={kernel}: this backbone has its own attention. Take run.attention=auto."
        )
    reason = why_not(kernel, device, dtype)
    if reason:
        raise ValueError(
            f"run.attention={kernel} cannot be used here: {reason}. run.attention=auto always can."
        )
    for layer in layers:
        layer.kernel = kernel


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: PackedBatch) -> Tensor:
    ops = import_module("xformers.ops")
    lengths = [tokens for images, tokens in segments.groups for _ in range(images)]
    mask = ops.fmha.BlockDiagonalMask.from_seqlens(lengths, device=q.device)
    out: Tensor = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
    return out[0]


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: PackedBatch) -> Tensor:
    starts = segments.starts(q.device)
    longest = max(tokens for _, tokens in segments.groups)
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    out: Tensor = varlen_attn(q, k, v, starts, starts, longest, longest)
    return out


def _by_head(group: Tensor, parts: int, heads: int) -> Tensor:
    """(images, tokens, parts * D) as (parts, images, H, tokens, d), a view."""
    return group.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _is_short(qkv: Tensor, segments: PackedBatch) -> bool:
    # The fused CPU kernel's backward is made for long sequences: at 17 to 197 tokens in bf16 the two plain
    # products took a fifth of its time on an AVX-512 machine, and their scores are small.
    return qkv.device.type == "cpu" and max(tokens for _, tokens in segments.groups) <= 256


class _Short(torch.autograd.Function):
    """Attention as two plain products a group; results are written where they belong, without a copy more."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, segments: PackedBatch) -> Tensor:
        out, kept = qkv.new_empty(len(qkv), qkv.shape[1] // 3), []
        for group, done in zip(segments.split(qkv), segments.split(out), strict=True):
            split = _by_head(group, 3, heads).contiguous()
            q, k, v = split.flatten(1, 2)  # (images * H, tokens, d) each
            # Autocast would take the softmax to float32 and back.
            with torch.autocast(q.device.type, enabled=False):
                scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
                weights = scores.softmax(dim=-1)
            _by_head(done, 1, heads).copy_(torch.bmm(weights, v).view(1, *split.shape[1:]))
            kept += [split, weights]
        ctx.save_for_backward(*kept)
        ctx.heads, ctx.segments = heads, segments
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        heads, segments, kept = ctx.heads, ctx.segments, iter(ctx.saved_tensors)
        of_qkv = grad.new_empty(len(grad), 3 * grad.shape[1])
        for of_out, of_group in zip(segments.split(grad), segments.split(of_qkv), strict=True):
            split, weights = next(kept), next(kept)
            q, k, v = split.flatten(1, 2)
            own, done = _by_head(of_out, 1, heads).flatten(0, 2), torch.empty_like(split)
            dq, dk, dv = done.flatten(1, 2)
            torch.bmm(weights.mT, own, out=dv)
            of_scores = torch._softmax_backward_data(torch.bmm(own, v.mT), weights, -1, weights.dtype)
            scale = q.shape[-1] ** -0.5
            torch.baddbmm(dq, of_scores, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(dk, of_scores.mT, q, beta=0, alpha=scale, out=dk)
            _by_head(of_group, 3, heads).copy_(done)
        return of_qkv, None, None


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of the released files (qkv, proj)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel: Kernel = "auto"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    @property
    def last(self) -> nn.Module:
        """The layer that gives the result, before its scale."""
        return self.proj

    def forward(
        self,
        rows: Tensor,
        segments: PackedBatch,
        scale: LayerScale | None = None,
        norm: nn.LayerNorm | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D), normalised first and scaled at last if asked; of `read` (t,) alone: (t, D)."""
        attended = attend(after_norm(rows, norm, self.qkv), self.heads, segments, self.kernel)
        return project(attended if read is None else attended.index_select(0, read), self.proj, scale)
