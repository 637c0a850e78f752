"""Attention over crops of different sizes in one pass; the only file that knows an attention kernel.

The tokens of a step are laid end to end as rows, and a Segments remembers which rows are one image. Norms,
MLPs and residuals work row by row and never ask; only attend() does.

    T  rows: the sum over groups of images * tokens      H  attention heads
    D  width of the model                                d  width of one head, D / H
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Segments:
    """How rows (T, D) are made of groups of images with equally many tokens."""

    groups: tuple[tuple[int, int], ...]  # (images, tokens an image) of each group, in the order of the rows

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows (T, D) as one (images, tokens, D) a group; views, no copies."""
        parts = rows.split([images * tokens for images, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]


def attend(qkv: Tensor, heads: int, segments: Segments) -> Tensor:
    """Softmax attention inside each image, never across two.

    One kernel call a group: on a CPU, five to ten times faster than nested tensors or a block-diagonal mask.

    Args:
        qkv: (T, 3 * D), queries, keys and values of each row; within each, head after head.
        heads: H.
        segments: which rows are one image.

    Returns:
        (T, D), before the output projection.
    """
    outs = []
    for group in segments.split(qkv):
        split = group.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split.contiguous()  # (images, H, tokens, d) each
        out = _short(q, k, v) if _is_short(q) else F.scaled_dot_product_attention(q, k, v)
        outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))  # (images * tokens, D)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _is_short(q: Tensor) -> bool:
    # The fused CPU kernel's backward is made for long sequences: at 17 to 197 tokens in bf16 the two plain
    # products took a fifth of its time on an AVX-512 machine, and their scores are small.
    return q.device.type == "cpu" and q.shape[2] <= 256


def _short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):  # it would take the softmax to float32 and back
        return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of the released files (qkv, proj)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, rows: Tensor, segments: Segments) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.proj(attend(self.qkv(rows), self.heads, segments))
