"""Attention over crops of different sizes in one pass; the only file that knows an attention kernel.

The tokens of a step are laid end to end as rows, and a Segments remembers which rows are one image. Norms, MLPs and
residuals work row by row and never ask; only attend() does.

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

    One kernel call a group: on a CPU this beat nested tensors and a block-diagonal mask five to ten times over.

    Args:
        qkv: (T, 3 * D), queries, keys and values of each row; within each, head after head.
        heads: H.
        segments: which rows are one image.

    Returns:
        (T, D), before the output projection.
    """
    outs = []
    for group in segments.split(qkv):
        q, k, v = group.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (images, H, tokens, d) each
        out = F.scaled_dot_product_attention(q, k, v)
        outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))  # (images * tokens, D)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


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
