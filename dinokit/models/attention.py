"""The layers of a block: attention over crops of different sizes in one pass, LayerScale, DropPath, MLPs.

The tokens of all images of a step are the rows of one tensor, and a PackedBatch says which rows are one
image. Norms, MLPs and residuals work on each row alone; only attention needs to know the images.

    T  rows: the sum over groups of images * tokens      H  attention heads
    D  width of the model                                d  width of one head, D / H

All kernels give the same numbers (tests/models/test_attention.py):

    auto      sdpa; in training on a CPU, two plain products where images are short (models/fused.py)
    sdpa      torch's scaled_dot_product_attention, one call for each group: five to ten times faster on a
              CPU than nested tensors or a block-diagonal mask
    xformers  memory_efficient_attention over all rows with a block-diagonal mask; CUDA
    varlen    torch's varlen_attn over all rows; CUDA, bf16 or fp16
"""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PackedBatch:
    """Which of the rows (T, D) are one image: groups of images with equally many tokens."""

    groups: tuple[tuple[int, int], ...]  # (images, tokens per image) of each group
    # For each group cosine and sine of the angles of its tokens, (2, tokens, d); () without rotary positions.
    rotations: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows (T, D) as (images, tokens, D) for each group; views, no copies."""
        groups = rows.split([images * tokens for images, tokens in self.groups])
        return [x.unflatten(0, shape) for x, shape in zip(groups, self.groups, strict=True)]

    def starts(self, device: torch.device) -> Tensor:
        """The row where each image begins, and the number of rows: (images + 1,) int32."""
        starts, row = [], 0
        for images, tokens in self.groups:
            starts.append(torch.arange(row, row + images * tokens, tokens, dtype=torch.int32, device=device))
            row += images * tokens
        return torch.cat([*starts, torch.full((1,), row, dtype=torch.int32, device=device)])


Kernel = Literal["auto", "sdpa", "xformers", "varlen"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


def attend(qkv: Tensor, heads: int, batch: PackedBatch, kernel: Kernel = "auto") -> Tensor:
    """Softmax attention inside each image, never across two.

    Args:
        qkv: (T, 3 * D), queries, keys and values of each row; within each, head after head.
        heads: H.
        batch: which rows are one image.
        kernel: what computes it.

    Returns:
        (T, D), before the output projection.
    """
    if kernel in ("xformers", "varlen"):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)  # (T, H, d) each
        return (_xformers if kernel == "xformers" else _varlen)(q, k, v, batch).flatten(1)
    if len(batch.groups) == 1:
        q, k, v = split_heads(batch.split(qkv)[0], 3, heads).contiguous()  # (images, H, tokens, d) each
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    each = zip(batch.split(qkv), batch.groups, strict=True)
    return torch.cat([attend(x.flatten(0, 1), heads, PackedBatch((group,)), kernel) for x, group in each])


def unavailable_reason(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel cannot be used on this device, found out by trying; empty if it can."""
    if kernel in ("auto", "sdpa"):
        return ""
    if device.type != "cuda":
        return f"it needs CUDA, and this is {device.type}"
    try:
        x = torch.zeros(16, 3 * 32, device=device, dtype=dtype, requires_grad=True)
        attend(x, 1, PackedBatch(((2, 8),)), kernel).sum().backward()
    except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1:] if kernel == "xformers" and len(lines) > 1 else []  # it stands at the end there
        return " ... ".join([lines[0], *(line.strip() for line in reason)])
    return ""


def use_kernel(network: nn.Module, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    """Set the kernel of every attention layer of a network.

    Raises:
        ValueError: if it cannot be used on this device or in this network.
    """
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    if kernel != "auto" and not layers:
        raise ValueError(
            f"run.attention={kernel}: this backbone has its own attention. Take run.attention=auto."
        )
    reason = unavailable_reason(kernel, device, dtype)
    if reason:
        raise ValueError(
            f"run.attention={kernel} cannot be used here: {reason}. run.attention=auto always can."
        )
    for layer in layers:
        layer.kernel = kernel


def _xformers(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    mask = _block_diagonal_mask(PackedBatch(batch.groups), q.device)
    attention = import_module("xformers.ops").memory_efficient_attention
    out: Tensor = attention(q[None], k[None], v[None], attn_bias=mask)
    return out[0]


@lru_cache(maxsize=64)
def _block_diagonal_mask(batch: PackedBatch, device: torch.device) -> Any:
    # Kept for the next layers and steps: it is a list of all images, made on the host and sent to the device.
    lengths = [tokens for images, tokens in batch.groups for _ in range(images)]
    return import_module("xformers.ops").fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    starts = batch.starts(q.device)
    longest = max(tokens for _, tokens in batch.groups)
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    out: Tensor = varlen_attn(q, k, v, starts, starts, longest, longest)
    return out


def split_heads(group: Tensor, count: int, heads: int) -> Tensor:
    """(images, tokens, count * D) as (count, images, H, tokens, d), a view."""
    return group.unflatten(2, (count, heads, -1)).permute(2, 0, 3, 1, 4)


def rotate(qkv: Tensor, heads: int, batch: PackedBatch) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): queries and keys turned by the angles of their tokens.

    Channel c of a head is turned together with channel c + d / 2. Values stay as they are.

    Args:
        qkv: (T, 3 * D), as for attend().
        heads: H.
        batch: with rotations; those in float32 turn half precision in float32.

    Returns:
        (T, 3 * D).
    """
    rotated = []
    for group, (cos, sin) in zip(batch.split(qkv), batch.rotations, strict=True):
        qk, v = group.unflatten(2, (3, heads, -1)).split([2, 1], dim=2)  # (images, tokens, 2 or 1, H, d)
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos[:, None, None] + torch.cat([-second, first], dim=-1) * sin[:, None, None]
        rotated.append(torch.cat([qk.to(v.dtype), v], dim=2).flatten(2).flatten(0, 1))
    return torch.cat(rotated)


class MaskedBiasLinear(nn.Linear):
    """The projection to queries, keys and values, with a bias for queries and values alone (DINOv3).

    The bias keeps its 3 * D numbers, as in the released files; `bias_mask` is 0 for those of the keys.
    """

    bias_mask: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        ones, zeros = torch.ones(width), torch.zeros(width)
        self.register_buffer("bias_mask", torch.cat([ones, zeros, ones]))

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, 3 * D)."""
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


QkvBias = Literal["all", "no_keys", "none"]


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of the released files (qkv, proj)."""

    def __init__(self, width: int, heads: int, qkv_bias: QkvBias = "all") -> None:
        super().__init__()
        self.heads = heads
        self.kernel: Kernel = "auto"
        if qkv_bias == "no_keys":
            self.qkv: nn.Linear = MaskedBiasLinear(width)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias == "all")
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Queries, keys and values of rows (T, D), rotated if the batch has rotations: (T, 3 * D)."""
        qkv = self.qkv(x)
        return rotate(qkv, self.heads, batch) if batch.rotations else qkv

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.proj(attend(self.project(x, batch), self.heads, batch, self.kernel))


class LayerScale(nn.Module):
    """A gain for each channel, near zero at the start (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, a residual branch is dropped for some images of each group.

    Of b images, max(int(b * (1 - rate)), 1) keep the branch. It is scaled by b over that number, so that the
    mean over the group stays the same (DINOv2, arXiv 2304.07193, section 5).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    @property
    def active(self) -> bool:
        """Whether any branch is dropped."""
        return self.training and self.rate > 0

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """The branch (T, D) of all images -> (T, D)."""
        return x * self.factors(batch, x.device) if self.active else x

    def draw(self, batch: PackedBatch, device: torch.device) -> list[Tensor]:
        """For each group, the images that keep the branch."""
        return [
            torch.rand(images, device=device).argsort()[: max(int(images * (1 - self.rate)), 1)]
            for images, _ in batch.groups
        ]

    def factors(self, batch: PackedBatch, device: torch.device) -> Tensor:
        """What the branch of each row is multiplied by: 0 or the scale, (T, 1)."""
        factors = []
        for (images, tokens), chosen in zip(batch.groups, self.draw(batch, device), strict=True):
            factor = torch.zeros(images, device=device).index_fill_(0, chosen, images / len(chosen))
            factors.append(factor.repeat_interleave(tokens, output_size=images * tokens))
        return torch.cat(factors)[:, None]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the exact GELU; `hidden` channels inside, 0: four times as many."""

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) with x1, x2 the halves of w12(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8  # two thirds of the MLP's, rounded up to 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class SplitSwiGLU(nn.Module):
    """w3(silu(w1(x)) * w2(x)): a SwiGLU with two matrices in place of w12, as DINOv3 stores it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
