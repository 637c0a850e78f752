"""Any model of timm as a frozen backbone: SigLIP, CLIP, EVA-02, AIMv2, ConvNeXt, ResNet and others.

It is read, not trained: it has no mask token, and its parameters are not in the order of depth. A ViT that
is to be trained is a `timm_vit`.
"""

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config.registry import suggest
from dinokit.models import Backbone, Input, Tokens, check_blocks

# Arguments of timm.create_model() that name files, or that this backbone gives itself.
OWN = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path",
    "cache_dir", "scriptable", "exportable", "no_jit", "num_classes", "in_chans",
}  # fmt: skip


@dataclass
class Config:
    model: str = "vit_base_patch16_siglip_224.webli"  # a name of timm, with or without the tag of its weights
    channels: int = 3
    size: int = 0  # pixels of an image's side; 0: the size that the model was trained on
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model()
    pretrained: bool = False  # whether timm downloads the weights; else they are random, or from a file


class TimmAny(Backbone):
    """A model of timm, whose parameters are under `net`.

    Its size, mean and deviation are those of timm's pretrained_cfg. `cls_kind` says what its class token is:

    class: the first prefix token; the other prefix tokens are the registers
    pooled: the model has no class token (SigLIP) and pools its patches by attention
    mean: it has neither (AIMv2); the mean of its patches
    head: it gives maps (ConvNeXt) or rows of patches alone (mixers), and this is what its classifier reads:
        their mean after its norms

    Args:
        cfg: the settings.

    Raises:
        LookupError: if timm has no such model or tag.
        ValueError: if timm cannot build the model with these arguments, it gives no features of places, or
            its weights are for other images.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.net, self.model, self.channels = _create(cfg), cfg.model, cfg.channels
        trained = self.net.pretrained_cfg
        self.settings = {"channels": cfg.channels, "size": cfg.size, "args": dict(cfg.args)}
        self.width, self.patch = self.net.num_features, int(self.net.feature_info[-1]["reduction"])
        shown = cfg.size or trained["input_size"][1]
        self.input = Input(shown, tuple(trained["mean"]), tuple(trained["std"]))
        self.reads_tokens = _takes(self.net.forward_intermediates, "return_prefix_tokens")
        self.prefix = int(getattr(self.net, "num_prefix_tokens", 0)) if self.reads_tokens else 0
        has_class = self.prefix > int(getattr(self.net, "num_reg_tokens", 0) or 0)
        pools = getattr(self.net, "attn_pool", None) is not None
        self.cls_kind = "class" if has_class else "pooled" if pools else "mean"
        if not self.reads_tokens:
            self.cls_kind = "head"
        self.frozen_only = "timm_any is for frozen models: a ViT of timm is trained as a timm_vit"
        if cfg.pretrained:
            self.licence = str(trained.get("license") or "")
        _warn_of_activation(cfg.model, trained)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """In the order of depth; of a CNN its stages, and placeholders where timm has no list of them."""
        depth = len(self.net.feature_info)
        for name in ("blocks", "stages", "layers"):
            found = list(getattr(self.net, name, ()))
            if len(found) == depth:
                return nn.ModuleList(found)
        return nn.ModuleList(nn.Identity() for _ in range(depth))

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone: one pass for each group.

        Raises:
            ValueError: for a mask, or an image of a size that the model does not take.
        """
        if any(mask is not None for mask in masks):
            raise ValueError(f"{self.model} has no mask token: {self.frozen_only}.")
        return [self._last(x) for x in crops]

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """As Backbone. Of a CNN: after each of its stages, whose widths differ.

        The larger maps of earlier stages are averaged to the grid of the last one. Class tokens of a model
        without one are the mean of the patches, except after its last block and norm.
        """
        depth = len(self.net.feature_info)
        check_blocks(blocks, depth)
        wanted = sorted(set(blocks))
        if not wanted:
            return []
        options = {"return_prefix_tokens": True} if self.prefix else {}
        found = self._run(
            self.net.forward_intermediates, crops, indices=wanted, norm=norm, stop_early=True,
            output_fmt="NCHW", intermediates_only=True, **options,
        )  # fmt: skip
        grid = (crops.shape[2] // self.patch, crops.shape[3] // self.patch)
        tokens = [self._tokens_of_map(each, grid) for each in found]
        if norm and wanted[-1] == depth - 1 and self.cls_kind != "class":
            tokens[-1] = self._last(crops)
        return tokens

    def _last(self, x: Tensor) -> Tokens:
        rows = self._run(self.net.forward_features, x)
        if not self.reads_tokens:
            return self._pooled(rows, (x.shape[2] // self.patch, x.shape[3] // self.patch))
        patches, prefix = rows[:, self.prefix :], rows[:, : self.prefix]
        if self.cls_kind == "class":
            return Tokens(prefix[:, 0], prefix[:, 1:], patches)
        pooled = self.cls_kind == "pooled"
        cls = self.net.forward_head(rows, pre_logits=True) if pooled else patches.mean(dim=1)
        return Tokens(cls, prefix, patches)

    def _pooled(self, rows: Any, grid: tuple[int, int]) -> Tokens:
        """Tokens of a model without prefix ones: from a map (b, D, h, w), or rows of places (b, h w, D).

        The class token is the mean of the patches where the model's own pooling changes their width, as in
        MobileNets, whose last convolution comes after it.

        Raises:
            ValueError: for another shape, such as rows with a class token that timm does not tell apart.
        """
        if isinstance(rows, Tensor) and rows.ndim == 4:
            last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
            patches = (rows.permute(0, 3, 1, 2) if last else rows).flatten(2).transpose(1, 2)
        else:
            patches = rows
        places = grid[0] * grid[1]
        shape = tuple(getattr(patches, "shape", ()))
        if shape[1:] != (places, self.width):
            raise ValueError(
                f"{self.model} has features of shape {shape}, where {places} places of {self.width} numbers "
                f"are expected: dinokit cannot tell what its class token and its patches are. Take another "
                f"model of timm."
            )
        cls = self.net.forward_head(rows, pre_logits=True).flatten(1)
        if cls.shape[1] != self.width:
            cls = patches.mean(dim=1)
        return Tokens(cls, patches[:, :0], patches)

    def _tokens_of_map(self, found: Any, grid: tuple[int, int]) -> Tokens:
        """Tokens from a map (b, D, h, w), or from a map and prefix tokens (b, P, D)."""
        maps, prefix = found if self.prefix else (found, None)
        patches = F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
        prefix = patches[:, :0] if prefix is None else prefix
        if self.cls_kind == "class":
            return Tokens(prefix[:, 0], prefix[:, 1:], patches)
        return Tokens(patches.mean(dim=1), prefix, patches)

    def _run(self, function: Any, crops: Tensor, **options: Any) -> Any:
        height, width = crops.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"an image of {height} x {width} pixels: {self.model} needs multiples of {self.patch}."
            )
        try:
            return function(crops, **options)
        except AssertionError as error:  # how timm refuses a size
            raise ValueError(
                f"{self.model} does not take images of {height} x {width} pixels: {error} It was made for "
                f"{self.input.size} x {self.input.size}."
            ) from None


def classifier_names(net: Any) -> tuple[str, ...]:
    """The layers of a model of timm that read its features for labels: a frozen backbone has none."""
    names = net.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _create(cfg: Config) -> Any:
    if own := sorted(OWN & set(cfg.args)):
        raise ValueError(
            f"backbone.args: {', '.join(own)} cannot be given: these are no settings of a model."
        )
    name, _, tag = cfg.model.partition(".")
    if not timm.is_model(name):
        raise LookupError(
            f"timm {timm.__version__} has no model '{name}'.{suggest(name, timm.list_models())} "
            f"backbone.model is a name of timm.list_models()."
        )
    tags = timm.models.get_arch_pretrained_cfgs(name)
    if tag and cfg.model not in tags:
        raise LookupError(
            f"timm {timm.__version__} has no weights '{tag}' of {name}.{suggest(cfg.model, list(tags))} It "
            f"has: {', '.join(tags) or 'none'}."
        )
    try:
        net, any_size = _net(cfg)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # timm checks few arguments: a width that the heads do not divide is an assertion, no heads a division
        size = f" and size={cfg.size}" if cfg.size else ""
        raise ValueError(
            f"timm cannot build backbone.model={cfg.model} with args={cfg.args}{size}: {error!r}."
        ) from error
    trained: Any = net.pretrained_cfg
    channels, size = trained["input_size"][0], trained["input_size"][1]
    if channels != cfg.channels:
        raise ValueError(
            f"backbone.channels={cfg.channels}, but {cfg.model} was trained on {channels}: a frozen model "
            f"takes the images that it was trained on."
        )
    if cfg.size and cfg.size != size and not any_size:
        raise ValueError(f"backbone.size={cfg.size}, but {cfg.model} takes images of {size} pixels only.")
    if not hasattr(net, "forward_intermediates") or not getattr(net, "feature_info", None):
        raise ValueError(f"backbone.model={cfg.model} gives no features of places: timm reads none of it.")
    return net


def _net(cfg: Config) -> tuple[Any, bool]:
    """The model, and whether it takes images of any size."""
    options = {**cfg.args, "num_classes": 0, "in_chans": cfg.channels, "pretrained": cfg.pretrained}
    anew = {**options, "dynamic_img_size": True, **({"img_size": cfg.size} if cfg.size else {})}
    try:
        return timm.create_model(cfg.model, **anew), True
    except TypeError:  # a model without stored positions, or one of a single size
        net = timm.create_model(cfg.model, **options)
        return net, not cast(Any, net.pretrained_cfg).get("fixed_input_size")


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _warn_of_activation(model: str, trained: Any) -> None:
    """Weights that were trained with QuickGELU are loaded by timm into a model with GELU without a word."""
    notes = " ".join(trained.get("notes") or ())
    if "quickgelu" in notes and "quickgelu" not in model:
        other = model.replace("_clip_", "_clip_quickgelu_")
        warnings.warn(
            f"{model}: these weights were trained with QuickGELU, and this model computes GELU, so its "
            f"features differ a little from the original. Take backbone.model={other}.",
            stacklevel=2,
        )


build = TimmAny
