"""The pre-norm transformer block of DINO, DINOv2 and DINOv3 (Dosovitskiy et al. 2021, arXiv 2010.11929).

The trainer replaces its forward pass by a faster one with the same results (models/fused.py).
"""

from typing import Literal

from torch import Tensor, nn

from dinokit.models.attention import (
    Attention,
    DropPath,
    LayerScale,
    Mlp,
    PackedBatch,
    QkvBias,
    SplitSwiGLU,
    SwiGLU,
)

NORM_EPS = 1e-6  # DINO and DINOv2 use it instead of PyTorch's 1e-5, which DINOv3 uses


class Block(nn.Module):
    """One transformer block with the parameter names of the released files.

    Args:
        width: D.
        heads: of attention.
        ffn: the feed-forward net.
        layer_scale: initial gain of both LayerScales; 0: none.
        drop_path: rate of stochastic depth.
        hidden: channels inside the feed-forward net; 0: as mlp and swiglu have by themselves.
        qkv_bias: of the projection to queries, keys and values.
        eps: of the norms.
    """

    def __init__(
        self, width: int, heads: int, ffn: Literal["mlp", "swiglu", "split_swiglu"], layer_scale: float,
        drop_path: float, hidden: int = 0, qkv_bias: QkvBias = "all", eps: float = NORM_EPS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        if ffn == "split_swiglu":
            self.mlp: nn.Module = SplitSwiGLU(width, hidden)
        else:
            self.mlp = Mlp(width, hidden) if ffn == "mlp" else SwiGLU(width)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Rows (T, D) of many images -> (T, D)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), batch)), batch)
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))), batch)
        return x  # noqa: RET504
