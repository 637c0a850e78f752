"""EoMT: a ViT that segments by itself (Kerssies et al. 2025, arXiv 2503.19108).

Learned queries join the tokens of the last blocks; each gives a class, and a mask by its products with the
enlarged map of patches. In training a query sees only the patches inside the mask that it would give so far,
as in Mask2Former (arXiv 2112.01527); the share of queries that are so restricted falls to none, so the
trained network is a plain ViT.

b  images     Q  queries     C  classes     D  width     h, w  patches down and across     T  tokens
u  patches are enlarged so many times: 4 pixels a place for patches of 16 and 14
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import Backbone
from dinokit.models.attention import PackedBatch, split_heads
from dinokit.models.dinov3 import DINOv3
from dinokit.models.vit import VisionTransformer

JOINT = {12: 3, 24: 4, 40: 5}  # blocks that see queries, by the depth of the backbone
POWER = 0.9  # of the fall of the share of restricted queries


class Segments(NamedTuple):
    """What the queries give after one block."""

    masks: Tensor  # (b, Q, u h, u w) logits
    classes: Tensor  # (b, Q, C + 1) logits; the last class is no object


def joint_blocks(backbone: Backbone, count: int = 0) -> int:
    """How many last blocks see the queries; 0: as published, and a quarter of them for other depths.

    Raises:
        ValueError: if the backbone's blocks cannot take further tokens, or there are not so many.
    """
    if not isinstance(backbone, VisionTransformer | DINOv3):
        raise ValueError(
            f"EoMT puts queries among the tokens of a backbone `vit` or `dinov3`, and this is a "
            f"{type(backbone).__name__}: `dinokit eval segmentation` takes any backbone with patches."
        )
    depth = len(backbone.blocks)
    if count > depth:
        raise ValueError(f"blocks={count}: the backbone has {depth}. Give {depth} or fewer, or 0.")
    return count or JOINT.get(depth, max(depth // 4, 1))


def restricted_shares(step: int, steps: int, blocks: int) -> list[float]:
    """The share of queries that see only their masks, at each joint block.

    A training has `blocks` + 2 equal parts. At block i the share is 1 up to the end of part i, and falls to 0
    in the next part, as a power of what remains of it. In the last part all queries see everything.
    """
    part = steps / (blocks + 2)
    remaining = [min(max(i + 2 - step / part, 0.0), 1.0) for i in range(blocks)]
    return [x**POWER for x in remaining]


class Enlarge(nn.Module):
    """A map at twice its size: a transposed convolution, GELU, a convolution of each channel, layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(b, D, h, w) -> (b, D, 2 h, 2 w)."""
        x = self.mix(F.gelu(self.up(x)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EoMT(nn.Module):
    """A copy of a backbone with queries, a classifier, and a head of masks.

    The copy has neither stochastic depth nor noise of positions: it stays in eval mode.

    Args:
        backbone: a `vit` or `dinov3`.
        classes: C.
        queries: Q.
        blocks: that see the queries; 0: as joint_blocks().
        tune: what of the copy is trained: all, the joint blocks and the final norm, or none of it.

    Raises:
        ValueError: as joint_blocks().
    """

    def __init__(
        self, backbone: Backbone, classes: int, queries: int = 100, blocks: int = 0, tune: str = "all"
    ) -> None:
        super().__init__()
        self.blocks = joint_blocks(backbone, blocks)
        self.backbone, width = deepcopy(backbone).eval(), backbone.width
        self.joint: Tensor
        self.register_buffer("joint", torch.tensor(self.blocks))  # no shape in a file shows it
        self.first = len(backbone.blocks) - self.blocks
        self.backbone.requires_grad_(tune == "all")
        if tune == "joint":
            self.backbone.blocks[self.first :].requires_grad_(True)
            self.backbone.get_submodule("norm").requires_grad_(True)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.classify = nn.Linear(width, classes + 1)
        layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        self.embed = nn.Sequential(*layers, nn.Linear(width, width))
        doublings = max(1, int(math.log2(backbone.patch)) - 2)
        self.enlarge = nn.Sequential(*(Enlarge(width) for _ in range(doublings)))

    def train(self, mode: bool = True) -> Self:
        """As nn.Module; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor, shares: Sequence[float] = ()) -> list[Segments]:
        """The segments after the last block; in training those before each joint block come first.

        Args:
            images: (b, channels, H, W), normalised, with sides that are multiples of the patch.
            shares: of the queries that see only their masks, for each joint block; (): none anywhere. Which
                queries do is drawn from the global generator.
        """
        rows, batch = self.backbone.embed([images], [None])  # type: ignore[operator]
        x, found = batch.split(rows)[0], []
        grid = (images.shape[2] // self.backbone.patch, images.shape[3] // self.backbone.patch)
        rotations = self._rotations(grid, x.shape[1])
        for i, block in enumerate(self.backbone.blocks):
            visible = None
            if i == self.first:
                x = torch.cat([self.queries.expand(len(x), -1, -1), x], dim=1)
                rotations = self._rotations(grid, x.shape[1])
            if i >= self.first:
                share = shares[i - self.first] if shares else 0.0
                if self.training or share > 0:
                    found.append(self._segments(x, grid))
                if share > 0:
                    visible = self._visible(found[-1].masks, x.shape[1], grid, share)
            x = _through(block, x, rotations, visible)
        return [*found, self._segments(x, grid)]

    def _rotations(self, grid: tuple[int, int], tokens: int) -> tuple[Tensor, ...]:
        """The angles of `tokens` tokens, the last of which are the patches; () without rotary positions."""
        if not isinstance(self.backbone, DINOv3):
            return ()
        rope = self.backbone.rope_embed
        return (rope.table(rope.coordinates(*grid), tokens - grid[0] * grid[1]),)

    def _segments(self, x: Tensor, grid: tuple[int, int]) -> Segments:
        """The segments of all tokens (b, T, D), queries first and patches last."""
        x = self.backbone.norm(x)  # type: ignore[operator]
        queries, patches = x[:, : len(self.queries)], x[:, -grid[0] * grid[1] :]
        maps = self.enlarge(patches.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("bqd,bdhw->bqhw", self.embed(queries), maps)
        return Segments(masks, self.classify(queries))

    def _visible(self, masks: Tensor, tokens: int, grid: tuple[int, int], share: float) -> Tensor:
        """What each token may attend to, (b, 1, T, T): some queries not to patches outside of their masks."""
        inside = F.interpolate(masks.detach(), grid, mode="bilinear", align_corners=False).flatten(2) > 0
        if share < 1:
            drawn = torch.rand(*inside.shape[:2], device=masks.device)
            inside = inside | (drawn > share)[:, :, None]
        b, q, n = inside.shape
        visible = inside.new_ones(b, 1, tokens, tokens)
        visible[:, 0, :q, tokens - n :] = inside
        return visible


def _through(block: nn.Module, x: Tensor, rotations: tuple[Tensor, ...], visible: Tensor | None) -> Tensor:
    """Tokens (b, T, D) after a block, in which attention is limited to what is `visible`."""
    batch, rows = PackedBatch((tuple(x.shape[:2]),), rotations), x.flatten(0, 1)  # type: ignore[arg-type]
    if visible is None:
        return block(rows, batch).view_as(x)
    attention = block.get_submodule("attn")
    qkv = attention.project(block.norm1(rows), batch).view(*x.shape[:2], -1)  # type: ignore[operator]
    q, k, v = split_heads(qkv, 3, attention.heads)  # type: ignore[arg-type]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
    rows = rows + block.ls1(attention.proj(mixed))  # type: ignore[operator]
    return (rows + block.ls2(block.mlp(block.norm2(rows)))).view_as(x)  # type: ignore[operator]
