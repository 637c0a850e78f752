"""Our backbones of DINOv3 with the API of torch.hub's facebookresearch/dinov3.

A model here shares the backbone's own tables of parameters and modules, as in entry.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.models import Backbone, Tokens, dinov3


class DINOv3(nn.Module):
    """A dinov3 with the official methods. Images are (b, 3, h, w), sides multiples of the patch."""

    _vit: dinov3.DINOv3

    def __init__(self, vit: dinov3.DINOv3) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = vit._parameters, vit._buffers, vit._modules
        self.__dict__["_vit"] = vit  # not a child: that would add a prefix to every key
        self.head = nn.Identity()
        self.embed_dim = self.num_features = vit.width
        self.patch_size, self.n_blocks, self.num_heads = vit.patch, len(vit.blocks), vit.heads
        self.n_storage_tokens = vit.registers

    def train(self, mode: bool = True) -> "DINOv3":
        """As nn.Module.train; the noise of positions is drawn in training alone."""
        super().train(mode)
        self._vit.train(mode)
        return self

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """Class tokens (b, D); with is_training the dict of forward_features. Also for lists, as there."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(f["x_norm_clstoken"]) for f in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """The tokens after the final norm, and before it, of images and masks (b, N); of lists, a list."""
        several = isinstance(x, list | tuple)
        crops = list(x) if several else [x]
        hidden = list(masks or [None] * len(crops)) if several else [masks]
        rows, batch = self._vit.forward_blocks(crops, hidden)
        found = [
            _features(self._vit.tokens(group, i), group, mask)
            for i, (group, mask) in enumerate(zip(batch.split(rows), hidden, strict=True))
        ]
        return found if several else found[0]

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Outputs of some blocks, in the order of depth.

        Args:
            x: (b, C, h, w).
            n: the last n blocks, or the numbers of the blocks, from 0.
            reshape: patches as (b, D, h / patch, w / patch), else (b, N, D).
            return_class_token: add the class token (b, D) to each.
            return_extra_tokens: add the storage tokens (b, R, D) to each, last.
            norm: apply the final norm to each.

        Raises:
            ValueError: if there is no such block.
        """
        depth = len(self._vit.blocks)
        blocks = range(depth - n, depth) if isinstance(n, int) else n
        grid = (x.shape[2] // self._vit.patch, x.shape[3] // self._vit.patch)
        outs = []
        for tokens in self._vit.layers(x, blocks, norm):
            maps = tokens.patches.transpose(1, 2).unflatten(2, grid).contiguous()
            out = [maps if reshape else tokens.patches]
            out += [tokens.cls] if return_class_token else []
            outs.append(out + ([tokens.registers] if return_extra_tokens else []))
        return tuple(out[0] if len(out) == 1 else tuple(out) for out in outs)


class ConvNeXt(nn.Module):
    """A timm_convnext with the official calls; its parameters have timm's names, under `net`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Identity()
        self.embed_dim = backbone.width

    def forward(self, x: Tensor, is_training: bool = False) -> Any:
        """(b, 3, h, w) -> class tokens (b, D); with is_training the dict of forward_features."""
        features = self.forward_features(x)
        return features if is_training else self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Tensor) -> dict[str, Tensor | None]:
        """As those of DINOv3; there are no storage tokens, and `x_prenorm` has the normed ones."""
        tokens = self.backbone([x], [None])[0]
        return _features(tokens, torch.cat([tokens.cls[:, None], tokens.patches], dim=1), None)


def _features(tokens: Tokens, rows: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    return {
        "x_norm_clstoken": tokens.cls,
        "x_storage_tokens": tokens.registers,
        "x_norm_patchtokens": tokens.patches,
        "x_prenorm": rows,
        "masks": mask,
    }
