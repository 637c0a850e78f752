"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) of timm as a backbone, read as DINOv3 reads its own.

The class token is the mean of the last map and a patch is one of its places, both after the same norm
(DINOv3, arXiv 2508.10104). A place covers 32 x 32 pixels. No mask token: it is trained without masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from dinokit.config.registry import suggest
from dinokit.models import Backbone, Input, Tokens

STRIDE = 32  # pixels


@dataclass
class Config:
    model: str = "convnext_tiny"  # a name of timm; DINOv3 released tiny, small, base and large
    channels: int = 3
    size: int = 256  # pixels: the side of the images that it is shown; it takes any multiple of 32
    drop_path: float = 0.0  # a line from 0 to this over the blocks, as in timm


class TimmConvNeXt(Backbone):
    """A ConvNeXt of timm; its parameters are under `net`. Its four stages are its blocks.

    Raises:
        LookupError: if timm has no such model.
        ValueError: if it is no ConvNeXt that pools before its norm.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.net, self.model, self.config = _create(cfg), cfg.model, cfg
        self.width, self.patch, self.channels = self.net.num_features, STRIDE, cfg.channels
        self.input = Input(cfg.size, (0.5,) * cfg.channels, (0.5,) * cfg.channels)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The stages, in the order of depth; their maps differ in width, so layers() is not defined."""
        return nn.ModuleList(self.net.stages)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone: one pass for each group.

        Raises:
            ValueError: for a mask, or if a side is no multiple of 32.
        """
        return [self._forward_group(x, mask) for x, mask in zip(crops, masks, strict=True)]

    def _forward_group(self, x: Tensor, mask: Tensor | None) -> Tokens:
        if mask is not None:
            raise ValueError("a ConvNeXt has no mask token: train it without `masks` and losses.ibot.")
        if x.shape[2] % STRIDE or x.shape[3] % STRIDE:
            raise ValueError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels: a ConvNeXt needs multiples of {STRIDE}."
            )
        last = self.net.forward_features(x)  # (b, D, h / 32, w / 32)
        norm: Any = self.net.head.norm
        patches = norm(last).flatten(2).transpose(1, 2)
        cls = norm(last.mean(dim=(2, 3), keepdim=True)).flatten(1)
        return Tokens(cls=cls, registers=patches[:, :0], patches=patches)


def _create(cfg: Config) -> ConvNeXt:
    known = timm.list_models("*convnext*")
    if cfg.model not in known:
        raise LookupError(
            f"timm {timm.__version__} has no model '{cfg.model}'.{suggest(cfg.model, known)} "
            f"backbone.model is a name of timm.list_models('*convnext*')."
        )
    net = timm.create_model(cfg.model, num_classes=0, in_chans=cfg.channels, drop_path_rate=cfg.drop_path)
    if not isinstance(net, ConvNeXt) or not isinstance(net.norm_pre, nn.Identity):
        raise ValueError(
            f"backbone.model={cfg.model} is no ConvNeXt with a norm after its pooling, such as convnext_tiny."
        )
    return net


build = TimmConvNeXt
