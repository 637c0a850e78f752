"""The pre-norm transformer block of DINO and DINOv2, and stochastic depth, once.

x <- x + drop(scale1(attn(norm1(x))));  x <- x + drop(scale2(mlp(norm2(x)))), on rows (T, D) of many images.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models.attention import Attention, PackedBatch
from dinokit.models.linear import LayerScale, after_norm, is_bare, is_hooked, project

NORM_EPS = 1e-6  # both generations use it, not PyTorch's 1e-5


class Mlp(nn.Module):
    """fc1, exact GELU, fc2; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    @property
    def last(self) -> nn.Module:
        """The layer that gives the result, before its scale."""
        return self.fc2

    def forward(
        self, rows: Tensor, scale: LayerScale | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), normalised first and scaled at last if asked."""
        return project(after_norm(rows, norm, self.fc1), self.fc2, scale, gelu=True)


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) with x1, x2 the halves of w12(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8  # two thirds of the MLP's, on a multiple of 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    @property
    def last(self) -> nn.Module:
        """As in Mlp."""
        return self.w3

    def forward(
        self, rows: Tensor, scale: LayerScale | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), normalised first and scaled at last if asked."""
        x1, x2 = after_norm(rows, norm, self.w12).chunk(2, dim=-1)
        return project(F.silu(x1) * x2, self.w3, scale)


def residual(
    rows: Tensor,
    segments: PackedBatch,
    rate: float,
    branch: Callable[[Tensor, PackedBatch], Tensor],
    overwrite: bool = False,
) -> Tensor:
    """Rows + branch(rows), the branch computed on a random subset of the images of each group only.

    Of b images, max(int(b * (1 - rate)), 1) are kept and their branch is scaled by b over that number, so the
    mean over the group is unbiased and the work shrinks with the rate (DINOv2, arXiv 2304.07193, section 5).

    Args:
        rows: (T, D).
        segments: which rows are one image.
        rate: share of images to leave out; 0 is the plain residual.
        branch: (rows (T', D), their segments) -> (T', D).
        overwrite: whether the branch's result may become the sum.

    Returns:
        (T, D).
    """
    if rate == 0:
        out = branch(rows, segments)
        return out.add_(rows) if overwrite and out.dtype == rows.dtype else rows + out
    index, scale, kept, start = [], [], [], 0
    for images, tokens in segments.groups:
        chosen = _draw(images, rate, rows.device)
        keep = len(chosen)
        token = torch.arange(start, start + tokens, device=rows.device)
        index.append((chosen[:, None] * tokens + token).flatten())
        scale.append(torch.full((keep * tokens, 1), images / keep, device=rows.device))
        kept.append((keep, tokens))
        start += images * tokens
    places = torch.cat(index)  # (T',)
    out = branch(rows.index_select(0, places), PackedBatch(tuple(kept))) * torch.cat(scale)
    return rows.index_add(0, places, out.to(rows.dtype))


def gains(segments: PackedBatch, rate: float, read: Tensor) -> Tensor:
    """What residual() would multiply the branch of the rows `read` (t,) by: 0 or the scale, (t, 1)."""
    parts = []
    for images, tokens in segments.groups:
        chosen = _draw(images, rate, read.device)
        gain = torch.zeros(images, device=read.device).index_fill_(0, chosen, images / len(chosen))
        parts.append(gain.repeat_interleave(tokens, output_size=images * tokens))
    return torch.cat(parts).index_select(0, read)[:, None]


def _draw(images: int, rate: float, device: torch.device) -> Tensor:
    """The images whose branch is kept."""
    return torch.rand(images, device=device).argsort()[: max(int(images * (1 - rate)), 1)]


class Block(nn.Module):
    """One transformer block with the parameter names of the released files."""

    def __init__(
        self, width: int, heads: int, ffn: Literal["mlp", "swiglu"], layer_scale: float, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.overwrite = True  # what a branch gives may become the sum, in training
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else None
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width) if ffn == "mlp" else SwiGLU(width)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else None

    def forward(self, rows: Tensor, segments: PackedBatch, read: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D); or, of `read` (t,), these rows of it alone: (t, D)."""
        rate = self.drop_path if self.training else 0.0
        if read is not None:
            return self._read(rows, segments, rate, read)
        attn_is_ours, mlp_is_ours = self._ours(self.attn, self.ls1), self._ours(self.mlp, self.ls2)
        rows = residual(
            rows, segments, rate, lambda x, s: self.attn(x, s, self.ls1, self.norm1), attn_is_ours
        )
        return residual(rows, segments, rate, lambda x, _: self.mlp(x, self.ls2, self.norm2), mlp_is_ours)

    def _ours(self, branch: nn.Module, scale: LayerScale | None) -> bool:
        """Whether nobody else reads what a branch gives: no hook, nor a strange layer's backward pass."""
        last = getattr(branch, "last", None)
        known = last is not None and is_bare(last, nn.Linear)
        bare = known and is_bare(scale, LayerScale) and not is_hooked(branch)
        return self.training and self.overwrite and bare

    def _read(self, rows: Tensor, segments: PackedBatch, rate: float, read: Tensor) -> Tensor:
        # All rows are keys and values. What follows needs few of them, so that stochastic depth multiplies by
        # zero here: rows left out would have to be counted, for which a GPU would be waited for.
        out = self.attn(rows, segments, self.ls1, self.norm1, read)
        rows = rows.index_select(0, read)
        rows = rows + (out * gains(segments, rate, read) if rate else out)
        out = self.mlp(rows, self.ls2, self.norm2)
        return rows + (out * gains(segments, rate, read) if rate else out)
