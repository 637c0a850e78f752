"""The entry points of hubconf.py. Only torch is needed, until a file in safetensors is to be read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dinokit.hub.official import DINO, DINOv2, LinearClassifier
from dinokit.hub.released import DINOV2, RELEASED, Released
from dinokit.models.vit import SIZES, Config, VisionTransformer
from dinokit.weights import fill, load_backbone
from dinokit.weights.architecture import MEAN, STD
from dinokit.weights.checkpoint import open_checkpoint
from dinokit.weights.load import read

# What the official entry points call the fields of our Config.
OFFICIAL = {
    "img_size": "size",
    "in_chans": "channels",
    "drop_path_rate": "drop_path",
    "drop_path_uniform": "drop_path_uniform",
    "interpolate_offset": "pos_offset",
    "interpolate_antialias": "pos_antialias",
}
TRAINED_ON = ("LVD142M", "IMAGENET1K", "NONE")  # what official code may give as `weights`, besides a path


def backbone(name: str) -> Callable[..., nn.Module]:
    """The entry point of a released backbone."""
    model = RELEASED[name]

    def entry(*, pretrained: bool = True, weights: str | Path | None = None, **changes: Any) -> nn.Module:
        return _backbone(model, pretrained, weights, changes)

    return _named(
        entry, name, f"{name}: {model.parameters / 1e6:.0f} M parameters, patches of {model.patch} pixels."
    )


def classifier(name: str) -> Callable[..., nn.Module]:
    """The entry point of a released backbone with its linear classifier."""
    model = RELEASED[name]

    def entry(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: str | Path | None = None,
        head_weights: str | Path | None = None,
        **changes: Any,
    ) -> nn.Module:
        if layers not in (1, 4):
            raise ValueError(f"layers={layers}: there are linear classifiers over 1 block and over 4.")
        done = LinearClassifier(_backbone(model, pretrained, weights, changes), layers)
        file = head_weights or (fetch(model.linear_url(layers), "head_weights") if pretrained else None)
        if file is not None:
            try:
                done.linear_head.load_state_dict(open_checkpoint(file).tensors, strict=True)
            except RuntimeError as error:
                why = " ".join(line.strip() for line in str(error).splitlines()[1:4])
                raise ValueError(
                    f"{file} is not the classifier of {name} with layers={layers}: {why}"
                ) from None
        return done

    text = f"{name} and its linear classifier of ImageNet-1k over the last layers=1 or 4 blocks: 1000 logits."
    return _named(entry, f"{name}_lc", f"{text}\n\n    head_weights=PATH: a local file of the classifier.")


def depther(name: str, kind: Literal["ld", "dd"]) -> Callable[..., nn.Module]:
    """The entry point of a released backbone with its depth head, linear ("ld") or DPT ("dd").

    These need numpy, as all of dinokit but the backbones does.
    """
    model = RELEASED[name]

    def entry(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: str = "NYU",
        hub_range_bug: bool = False,
        backbone_weights: str | Path | None = None,
        head_weights: str | Path | None = None,
        **changes: Any,
    ) -> nn.Module:
        from dinokit.heads import released  # noqa: PLC0415 - needs numpy, which a backbone alone does not

        vit = _vit(model, pretrained, backbone_weights, changes, "backbone_weights")
        given = _given(pretrained, head_weights)
        return released.depther(vit, name, kind, given, layers, weights, hub_range_bug)

    which = "linear depth head, over layers=1 or 4 blocks" if kind == "ld" else "DPT depth head"
    text = f"{name} and its {which}: images in [0, 1] (b, 3, h, w) -> metres (b, 1, h, w)."
    entry.__name__ = entry.__qualname__ = f"{name}_{kind}"
    entry.__doc__ = f"""{text}

    weights="NYU" (to 10 m) or "KITTI" (to 80 m) says which head.
    hub_range_bug=True gives a linear NYU head the range to 80 m, as a version of the official code did.
    backbone_weights=PATH and head_weights=PATH read local files; what is not given is fetched once, or with
    pretrained=False drawn at random.
    Besides: {", ".join(OFFICIAL)}.
    """
    return entry


def segmenter(name: str) -> Callable[..., nn.Module]:
    """The entry point of a released backbone with its segmentation head. These need numpy too."""
    model = RELEASED[name]

    def entry(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: str = "ADE20K",
        backbone_weights: str | Path | None = None,
        head_weights: str | Path | None = None,
        **changes: Any,
    ) -> nn.Module:
        from dinokit.heads import released  # noqa: PLC0415 - as in depther()

        vit = _vit(model, pretrained, backbone_weights, changes, "backbone_weights")
        return released.segmenter(vit, name, _given(pretrained, head_weights), layers, weights)

    text = f"{name} and its segmentation head: images in [0, 1] (b, 3, h, w) -> logits (b, classes, h, w)."
    entry.__name__ = entry.__qualname__ = f"{name}_seg"
    entry.__doc__ = f"""{text}

    weights="ADE20K" (150 classes) or "VOC2012" (21) says which head, layers=1 ("linear") or 4 ("ms") of them.
    backbone_weights=PATH and head_weights=PATH read local files; what is not given is fetched once, or with
    pretrained=False drawn at random.
    Besides: {", ".join(OFFICIAL)}.
    """
    return entry


def _given(pretrained: bool, head_weights: str | Path | None) -> Callable[[str], str | Path] | None:
    """From the path of a released head to its file: the one that is given, or fetched; None draws one."""

    def file(path: str) -> str | Path:
        return head_weights or fetch(f"{DINOV2}/{path}", "head_weights")

    return file if pretrained or head_weights else None


def dinokit_backbone(weights: str | Path, heads: int | None = None) -> nn.Module:
    """A backbone of your own, or of any file that dinokit reads, with the API of DINOv2's models.

    weights: a file, or the folder of a run, of Hugging Face or of timm.
    heads: how many attention heads there are, for a file that does not say.
    """
    vit = load_backbone(weights, heads=heads)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{weights} holds a {type(vit).__name__}; only a vit has the official API.")
    return DINOv2(vit.requires_grad_(True)).eval()


def fetch(url: str, key: str = "weights") -> Path:
    """The local copy of a released file, in torch.hub's cache; fetched if it is not there yet.

    Raises:
        OSError: if it cannot be had; it says how to give a file by hand, under which key.
    """
    path = cached(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise OSError(
                f"{url} cannot be fetched: {error}. Put it at {path} by hand, or give {key}=PATH."
            ) from None
    return path


def cached(url: str) -> Path:
    """Where torch.hub keeps the file of a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _backbone(model: Released, pretrained: bool, weights: str | Path | None, changes: dict[str, Any]) -> Any:
    vit = _vit(model, pretrained, weights, changes)
    return DINOv2(vit) if model.values.get("mask_token", True) else DINO(vit)


def _vit(
    model: Released,
    pretrained: bool,
    weights: str | Path | None,
    changes: dict[str, Any],
    key: str = "weights",
) -> VisionTransformer:
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
    if vit.channels == len(MEAN):  # as all were trained; who gives other images normalises them
        vit.input = replace(vit.input, mean=MEAN, std=STD)
    if pretrained:
        fill(vit, fetch(model.url, key), heads=heads)
    return vit


def _named(entry: Callable[..., nn.Module], name: str, text: str) -> Callable[..., nn.Module]:
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{text}

    pretrained=True fetches the released file once; pretrained=False draws weights at random.
    weights=PATH reads a local file of any format that dinokit reads.
    Besides: {", ".join(OFFICIAL)}.
    """
    return entry
