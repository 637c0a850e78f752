"""Any Vision Transformer of timm with a class token, as a backbone."""

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dinokit.config.registry import suggest
from dinokit.models import Backbone, Input, Tokens, check_blocks


@dataclass
class Config:
    model: str = "vit_small_patch16_224"  # a name of timm
    channels: int = 3
    size: int = 224  # pixels: the image side whose patch grid the positional embedding stores
    drop_path: float = 0.0  # a line from 0 to this over the blocks, as in timm
    mask_token: bool = True


class TimmViT(Backbone):
    """A timm ViT, trained from scratch; its parameters are under `net`, the mask token beside it.

    Raises:
        LookupError: if timm has no such model.
        ValueError: if it is no ViT with a class token.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        net = _create(cfg)
        self.width, self.patch, self.channels = net.embed_dim, net.patch_embed.patch_size[0], cfg.channels
        self.input = Input(cfg.size, (0.5,) * cfg.channels, (0.5,) * cfg.channels)
        if cfg.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, self.width))
        self.net, self.model = net, cfg.model

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """In the order of depth."""
        return nn.ModuleList(self.net.blocks)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone: one pass for each group."""
        return [self._forward_group(x, mask) for x, mask in zip(crops, masks, strict=True)]

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """As Backbone."""
        check_blocks(blocks, len(self.net.blocks))
        rows, tokens = self._embed(crops, None), []
        for i, block in enumerate(self.net.blocks[: max(blocks, default=-1) + 1]):
            rows = block(rows)
            if i in blocks:
                tokens.append(self._tokens(self.net.norm(rows) if norm else rows))
        return tokens

    def _forward_group(self, x: Tensor, mask: Tensor | None) -> Tokens:
        rows = self._embed(x, mask)
        for block in self.net.blocks:
            rows = block(rows)
        return self._tokens(self.net.norm(rows))

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        patches = self.net.patch_embed(x)  # (b, h, w, D): timm keeps the grid when the image size may change
        if mask is not None:
            if not hasattr(self, "mask_token"):
                raise ValueError("masks need a mask token: set backbone.mask_token=true.")
            hidden = mask.view(patches.shape[:-1])[..., None]
            patches = torch.where(hidden, self.mask_token.to(patches.dtype), patches)
        return self.net.norm_pre(self.net.patch_drop(self.net._pos_embed(patches)))

    def _tokens(self, rows: Tensor) -> Tokens:
        prefix = self.net.num_prefix_tokens
        return Tokens(cls=rows[:, 0], registers=rows[:, 1:prefix], patches=rows[:, prefix:])


def _create(cfg: Config) -> VisionTransformer:
    if cfg.model not in timm.list_models():
        near = suggest(cfg.model, timm.list_models("*vit*"))
        raise LookupError(
            f"timm {timm.__version__} has no model '{cfg.model}'.{near} "
            f"backbone.model is a name of timm.list_models()."
        )
    try:
        net = timm.create_model(
            cfg.model,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
            img_size=cfg.size,
            in_chans=cfg.channels,
            drop_path_rate=cfg.drop_path,
        )
    except TypeError as error:
        raise ValueError(f"backbone.model={cfg.model} is not a plain ViT: {error}.") from None
    if not isinstance(net, VisionTransformer) or net.cls_token is None:
        raise ValueError(f"backbone.model={cfg.model} is no ViT with a class token, which DINO needs.")
    return net


build = TimmViT
