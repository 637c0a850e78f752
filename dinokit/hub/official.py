"""The API of the official models over our vit, so that code written for them runs as it is.

A model here shares the vit's own tables of parameters and modules. So the names in its state_dict are the
official ones, without a prefix, and whatever moves, loads or casts the one does it to the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.models.vit import VisionTransformer

Features = dict[str, Tensor | None]


class DINOv2(nn.Module):
    """As the models of torch.hub's facebookresearch/dinov2."""

    _vit: VisionTransformer

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        _share(self, vit)
        self.head = nn.Identity()
        self.embed_dim = self.num_features = vit.width
        self.patch_size, self.n_blocks, self.num_tokens = vit.patch, len(vit.blocks), 1
        first: Any = vit.blocks[0]
        self.num_heads, self.num_register_tokens = first.attn.heads, vit.registers

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """Class tokens (b, D); with is_training what forward_features gives.

        Args:
            x: (b, 3, h, w), or a list of such.
            masks: (b, N) bool or None, or a list of these.
            is_training: the name that official code gives it.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(f["x_norm_clstoken"]) for f in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """As VisionTransformer.forward_features; for lists of images and masks, a list of what it gives."""
        if isinstance(x, list | tuple):
            return [
                self._vit.forward_features(a, m) for a, m in zip(x, masks or [None] * len(x), strict=True)
            ]
        return self._vit.forward_features(x, masks)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """As VisionTransformer.get_intermediate_layers."""
        return self._vit.get_intermediate_layers(x, n, reshape, return_class_token, norm)


class DINO(nn.Module):
    """As the models of torch.hub's facebookresearch/dino."""

    _vit: VisionTransformer

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        _share(self, vit)
        self.embed_dim = self.num_features = vit.width

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> class tokens (b, D)."""
        return self._vit([x], [None])[0].cls

    def forward_features(self, x: Tensor) -> Features:
        """As DINOv2's."""
        return self._vit.forward_features(x)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """All tokens (b, 1 + N, D), after the final norm, of the last n blocks."""
        layers = self._vit.get_intermediate_layers(x, n, return_class_token=True)
        return [torch.cat([cls[:, None], patches], dim=1) for patches, cls in layers]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """(b, heads, 1 + N, 1 + N): each row says how the last block weighs all tokens for one."""
        last: Any = self._vit.blocks[-1]
        before = [len(self._vit.blocks) - 2]
        patches, cls = self._vit.get_intermediate_layers(x, before, False, True, norm=False)[0]
        rows, attn = last.norm1(torch.cat([cls[:, None], patches], dim=1)), last.attn
        q, k, _ = attn.qkv(rows).unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1)


class LinearClassifier(nn.Module):
    """A backbone of DINOv2 and its released classifier of ImageNet-1k: 1000 logits."""

    def __init__(self, backbone: DINOv2, layers: int) -> None:
        super().__init__()
        self.backbone, self.layers = backbone, layers
        self.linear_head = nn.Linear((1 + layers) * backbone.embed_dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 1000).

        The classifier sees the class tokens of the last blocks, in the order of depth, and the mean patch of
        the last one.
        """
        blocks = self.backbone.get_intermediate_layers(x, self.layers, return_class_token=True)
        seen = [cls for _, cls in blocks] + [blocks[-1][0].mean(dim=1)]
        return self.linear_head(torch.cat(seen, dim=1))


def _share(model: nn.Module, vit: VisionTransformer) -> None:
    model._parameters, model._buffers, model._modules = vit._parameters, vit._buffers, vit._modules
    model.__dict__["_vit"] = vit  # not a child, which would put its name before every key
