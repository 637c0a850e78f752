"""The entry points of hubconf.py, and our vit with the API of DINO's and DINOv2's models.

Code written for those models runs unchanged. A model here shares the vit's own tables of parameters and
modules: the names in its state_dict are the official ones, without a prefix, and moving, loading or casting
one does the same to the other. Only torch is needed, until a safetensors file is read.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dinokit.hub import DINOV2, DINOV3_LICENCE, RELEASED, Released
from dinokit.hub.dinov3 import ConvNeXt, DINOv3
from dinokit.models import Backbone, dinov3
from dinokit.models import build as build_backbone
from dinokit.models.vit import SIZES, Config, VisionTransformer
from dinokit.weights import fill, load_backbone
from dinokit.weights.architecture import MEAN, STD
from dinokit.weights.checkpoint import open_checkpoint
from dinokit.weights.load import read

if TYPE_CHECKING:
    from dinokit.language.aligned import Aligned
    from dinokit.segment.predictor import Predictor

# The official names of fields of our Config.
OFFICIAL = {
    "img_size": "size",
    "in_chans": "channels",
    "drop_path_rate": "drop_path",
    "drop_path_uniform": "drop_path_uniform",
    "interpolate_offset": "pos_offset",
    "interpolate_antialias": "pos_antialias",
}
# Ends of the docstrings of entry points.
BACKBONE_FILES = """\
    pretrained=True downloads the released file once (of DINOv3 it takes the file that you put into the cache
    of torch.hub); pretrained=False initialises weights at random.
    weights=PATH reads a local file of any format that dinokit reads."""
HEAD_FILES = """\
    backbone_weights=PATH and head_weights=PATH read local files; other files are downloaded once, or
    with pretrained=False initialised at random."""
_DEPTH = """: images in [0, 1] (b, 3, h, w) -> metres (b, 1, h, w).

    weights="NYU" (to 10 m) or "KITTI" (to 80 m) selects the head.
    hub_range_bug=True gives a linear NYU head the range to 80 m, as a version of the official code did."""
# By kind of head: its training set, and the end of the docstring's first part.
HEADS = {
    "lc": (
        "IMAGENET1K",
        "linear classifier of ImageNet-1k on the last layers=1 or 4 blocks: images -> 1000 logits.",
    ),
    "ld": ("NYU", f"linear depth head, on layers=1 or 4 blocks{_DEPTH}"),
    "dd": ("NYU", f"DPT depth head{_DEPTH}"),
    "seg": (
        "ADE20K",
        """segmentation head: images in [0, 1] (b, 3, h, w) -> logits (b, classes, h, w).

    weights="ADE20K" (150 classes) or "VOC2012" (21) and layers=1 ("linear") or 4 ("ms") select the head.""",
    ),
}
TRAINED_ON = (
    "LVD142M",
    "LVD1689M",
    "IMAGENET1K",
    "NONE",
)  # values of `weights` in official code, besides a path


def backbone_entry(name: str) -> Callable[..., nn.Module]:
    """The torch.hub entry point of a released backbone."""
    model = RELEASED[name]

    def entry(*, pretrained: bool = True, weights: str | Path | None = None, **changes: Any) -> nn.Module:
        return _backbone(model, pretrained, weights, changes)

    return _named(
        entry, name, f"{name}: {model.parameters / 1e6:.0f} M parameters, patches of {model.patch} pixels."
    )


def head_entry(name: str, kind: Literal["lc", "ld", "dd", "seg"]) -> Callable[..., nn.Module]:
    """The entry point of a released backbone with a released head, one of HEADS.

    Heads for depth and segmentation need numpy; classifiers and backbones need torch only.
    """
    model, (trained_on, text) = RELEASED[name], HEADS[kind]

    def entry(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: str | Path = trained_on,
        backbone_weights: str | Path | None = None,
        head_weights: str | Path | None = None,
        **changes: Any,
    ) -> nn.Module:
        if kind == "lc":  # there, as in the official code, `weights` is the file of the backbone
            backbone = _backbone(model, pretrained, backbone_weights or weights, changes)
            file = head_weights or (fetch(model.linear_url(layers), "head_weights") if pretrained else None)
            return _classifier(backbone, layers, file, name)
        from dinokit.heads.released import released_model  # noqa: PLC0415 - needs numpy

        options = {"hub_range_bug": changes.pop("hub_range_bug", False)} if kind != "seg" else {}
        vit = released_vit(model, pretrained, backbone_weights, changes, "backbone_weights")

        def file_of(path: str) -> str | Path:
            return head_weights or fetch(f"{DINOV2}/{path}", "head_weights")

        find_file = file_of if pretrained or head_weights else None
        return released_model(vit, name, kind, find_file, layers, str(weights), **options)

    return _named(entry, f"{name}_{kind}", f"{name} and its {text}", HEAD_FILES)


def _classifier(backbone: "DINOv2", layers: int, file: str | Path | None, name: str) -> nn.Module:
    if layers not in (1, 4):
        raise ValueError(f"layers={layers}: there are linear classifiers for 1 block and for 4.")
    model = LinearClassifier(backbone, layers)
    if file is not None:
        try:
            model.linear_head.load_state_dict(open_checkpoint(file).tensors, strict=True)
        except RuntimeError as error:
            why = " ".join(line.strip() for line in str(error).splitlines()[1:4])
            raise ValueError(f"{file} is not the classifier of {name} with layers={layers}: {why}") from None
    return model


def dinokit_backbone(weights: str | Path, heads: int | None = None) -> nn.Module:
    """A backbone of your own, or of any file that dinokit reads, with the official API of its kind.

    weights: a file, or the folder of a run, of Hugging Face or of timm.
    heads: the number of attention heads, for a file that does not contain it.
    """
    vit = load_backbone(weights, heads=heads).requires_grad_(True)
    return _official(vit, f"{weights} contains").eval()


def dinokit_predictor(weights: str | Path, head: str | Path = "", device: str = "auto") -> "Predictor":
    """Masks of objects from points, boxes and masks: dinokit.segment.predictor.Predictor. It needs numpy.

    weights: a file or folder that dinokit reads; without a head, a folder of Hugging Face with a SAM.
    head: the file of a head that dinokit train-head trained on these weights, or the folder of its run.
    device: cpu, cuda, cuda:1 ...; auto: a GPU if there is one.
    """
    from dinokit.segment.predictor import Predictor  # noqa: PLC0415 - needs numpy

    return Predictor.load(weights, head, device)


def dinokit_aligned(weights: str | Path, align: str | Path, device: str = "auto") -> "Aligned":
    """Images and texts in one space: dinokit.language.aligned.Aligned. It needs numpy and transformers.

    weights: a file or folder that dinokit reads.
    align: the folder of a run of dinokit align on these weights.
    device: cpu, cuda, cuda:1 ...; auto: a GPU if there is one.
    """
    from dinokit.language.aligned import load_aligned  # noqa: PLC0415 - needs numpy

    return load_aligned(align, weights, device)


def _official(backbone: Backbone, subject: str) -> nn.Module:
    """A backbone with the official API of its kind."""
    if isinstance(backbone, VisionTransformer):
        return DINOv2(backbone)
    if isinstance(backbone, dinov3.DINOv3):
        return DINOv3(backbone)
    if type(backbone).__name__ == "TimmConvNeXt":  # not imported: it needs timm
        return ConvNeXt(backbone)
    kind = type(backbone).__name__
    raise ValueError(f"{subject} a {kind}; only vit, dinov3 and timm_convnext have the official API.")


def fetch(url: str, key: str = "weights") -> Path:
    """The local copy of a released file in torch.hub's cache; it is downloaded if it does not exist.

    Raises:
        OSError: if the download fails; the message names the argument for a local file.
    """
    path = cached_path(url)
    if "://" not in url and not path.is_file():
        raise LookupError(
            f"{url} is not at {path}. It stands under the {DINOV3_LICENCE}: Meta gives it to who accepts "
            f"that, on its own pages or on Hugging Face's hub, and dinokit downloads none. Put it there, or "
            f"give {key}=PATH."
        )
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise OSError(
                f"{url} cannot be downloaded: {error}. Put it at {path} yourself, or give {key}=PATH."
            ) from None
    return path


def cached_path(url: str) -> Path:
    """The path of a URL's file in torch.hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _backbone(model: Released, pretrained: bool, weights: str | Path | None, changes: dict[str, Any]) -> Any:
    if model.backbone != "vit":
        return _official(released_backbone(model, pretrained, weights, changes), model.name)
    vit = released_vit(model, pretrained, weights, changes)
    return DINOv2(vit) if model.values.get("mask_token", True) else DINO(vit)


def released_backbone(
    model: Released, pretrained: bool, weights: str | Path | None, changes: dict[str, Any]
) -> Backbone:
    """The backbone of a released model, with its weights, those of a file, or weights at random.

    Raises:
        TypeError: for a key of `changes` that the backbone does not have.
        LookupError, ValueError: if there are no such weights, or they do not fit.
    """
    if model.backbone == "vit":
        return released_vit(model, pretrained, weights, changes)
    allowed = {key: value for key, value in OFFICIAL.items() if value in ("size", "channels", "drop_path")}
    unknown = sorted(set(changes) - set(allowed))
    if unknown:
        raise TypeError(f"{model.name} takes no {', '.join(unknown)}; it takes {', '.join(allowed)}.")
    values = {allowed[key]: value for key, value in changes.items()}
    if model.backbone == "dinov3":
        backbone: Backbone = dinov3.DINOv3(dinov3.Config(**{**dinov3.SIZES[model.size], **values}))
    else:
        backbone = build_backbone({"name": model.backbone, "model": model.size, **values})
    if backbone.channels == len(MEAN):
        backbone.input = replace(backbone.input, mean=MEAN, std=STD)
    file = None if weights is None or str(weights) in TRAINED_ON else weights
    if file is not None or pretrained:
        file = file or fetch(model.url)
        stored = read(file, values=False)[1]
        no_bias = isinstance(backbone, dinov3.DINOv3) and stored.section.get("qkv_bias") == "none"
        missing = ["blocks.*.attn.qkv.bias*"] if no_bias else []  # timm's files leave out biases of zero
        fill(backbone, file, tolerate=["mask_token", "local_cls_norm.*", *missing])
        if no_bias:
            for name, parameter in backbone.named_parameters():
                if name.endswith("attn.qkv.bias"):
                    torch.nn.init.zeros_(parameter)
        backbone.input = replace(stored.input, size=backbone.input.size)
    return backbone


def released_vit(
    model: Released,
    pretrained: bool,
    weights: str | Path | None,
    changes: dict[str, Any],
    key: str = "weights",
) -> VisionTransformer:
    """The vit of a released model, with its weights, those of a file, or weights at random.

    Raises:
        TypeError: for a key of `changes` that is not in OFFICIAL.
        LookupError, ValueError: if there are no such weights, or they do not fit.
    """
    unknown = sorted(set(changes) - set(OFFICIAL))
    if unknown:
        raise TypeError(f"{model.name} takes no {', '.join(unknown)}; it takes {', '.join(OFFICIAL)}.")
    values: dict[str, Any] = {**SIZES[model.size], **model.values} | {
        OFFICIAL[key]: value for key, value in changes.items()
    }
    vit, heads = VisionTransformer(Config(**values)), SIZES[model.size]["heads"]
    if weights is not None and str(weights) not in TRAINED_ON:
        fill(vit, weights, tolerate=["mask_token"], heads=heads)
        vit.input = replace(read(weights, heads=heads, values=False)[1].input, size=vit.input.size)
        return vit
    if vit.channels == len(MEAN):  # all were trained so; for other channels the caller normalises
        vit.input = replace(vit.input, mean=MEAN, std=STD)
    if pretrained:
        fill(vit, fetch(model.url, key), heads=heads)
    return vit


def _named(
    entry: Callable[..., nn.Module], name: str, text: str, files: str = BACKBONE_FILES
) -> Callable[..., nn.Module]:
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{text}

{files}
    More arguments: {", ".join(OFFICIAL)}.
    """
    return entry


class DINOv2(nn.Module):
    """A vit with the API of torch.hub's facebookresearch/dinov2."""

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
        """Class tokens (b, D); with is_training the dict of forward_features.

        Args:
            x: (b, 3, h, w), or a list of such.
            masks: (b, N) bool or None, or a list of these.
            is_training: the official name of this argument.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(f["x_norm_clstoken"]) for f in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """As VisionTransformer.forward_features; for lists of images and masks, a list of its results."""
        if isinstance(x, list | tuple):
            return [
                self._vit.forward_features(a, m) for a, m in zip(x, masks or [None] * len(x), strict=True)
            ]
        return self._vit.forward_features(x, masks)

    def get_intermediate_layers(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As VisionTransformer.get_intermediate_layers."""
        return self._vit.get_intermediate_layers(x, *args, **options)


class DINO(nn.Module):
    """A vit with the API of torch.hub's facebookresearch/dino."""

    _vit: VisionTransformer

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        _share(self, vit)
        self.embed_dim = self.num_features = vit.width

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> class tokens (b, D)."""
        return self._vit([x], [None])[0].cls

    def forward_features(self, x: Tensor) -> dict[str, Tensor | None]:
        """As DINOv2's."""
        return self._vit.forward_features(x)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """All tokens (b, 1 + N, D), after the final norm, of the last n blocks."""
        layers = self._vit.get_intermediate_layers(x, n, return_class_token=True)
        return [torch.cat([cls[:, None], patches], dim=1) for patches, cls in layers]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """(b, heads, 1 + N, 1 + N): attention weights of the last block, one row for each query token."""
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

        The input of the classifier is the class tokens of the last blocks, in the order of depth, and the
        mean patch of the last block.
        """
        blocks = self.backbone.get_intermediate_layers(x, self.layers, return_class_token=True)
        vectors = [cls for _, cls in blocks] + [blocks[-1][0].mean(dim=1)]
        return self.linear_head(torch.cat(vectors, dim=1))


def _share(model: nn.Module, vit: VisionTransformer) -> None:
    model._parameters, model._buffers, model._modules = vit._parameters, vit._buffers, vit._modules
    model.__dict__["_vit"] = vit  # not a child: that would add a prefix to every key
