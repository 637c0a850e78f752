"""The files of DINOv3's Vision Transformers (arXiv 2508.10104): backbones and checkpoints of training.

Facts about names and shapes of these files; no code of that project is used. timm_dinov3.py and
huggingface_dinov3.py read and write the same models with the names of other libraries.

    D  width      d  width of a head
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.models import Input
from dinokit.models.dinov3 import Config, DINOv3, periods
from dinokit.weights.architecture import (
    DINOV3_LICENCE,
    DINOV3_NOTE,
    MEAN,
    SATELLITE_MEAN,
    SATELLITE_STD,
    STD,
    StoredBackbone,
    backbone_tensors,
    count_groups,
)
from dinokit.weights.checkpoint import Checkpoint, save_tensors
from dinokit.weights.formats import Exported
from dinokit.weights.formats.dinov2 import opened

PERIODS = "rope_embed.periods"
SATELLITE_WIDTH = 1024  # the released model of this width with a norm of local crops saw satellite images
ROUNDED = 2**-7  # largest relative error of periods that were rounded to bfloat16


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A ViT of DINOv3 with the names of its own files."""
    tensors, ignored = backbone_tensors(file.tensors)
    if "pos_embed" in tensors or not {"storage_tokens", PERIODS} & set(tensors):
        return None
    if "blocks.0.attn.qkv.weight" not in tensors or "patch_embed.proj.weight" not in tensors:
        return None  # Sapiens2 has storage tokens and other layers
    projectors = [name for name in tensors if name.startswith("projectors.")]
    tensors = {name: value for name, value in tensors.items() if name not in projectors}
    if heads is None and PERIODS in tensors:
        heads = tensors["cls_token"].shape[-1] // (4 * len(tensors[PERIODS]))
    satellite = "local_cls_norm.weight" in tensors and tensors["cls_token"].shape[-1] == SATELLITE_WIDTH
    mean, std = (SATELLITE_MEAN, SATELLITE_STD) if satellite else (None, None)
    kind = "training dump" if file.wrapper or ignored else "pretrain file"
    kind = f"DINOv3, {'satellite images, ' if satellite else ''}{kind}"
    ignored += [*count_groups(projectors), *file.other_keys]
    stored = stored_dinov3(kind, tensors, heads, ignored, mean, std)
    if projectors:
        stored.notes.append("Its projectors are those of EUPE, which has another licence than DINOv3.")
    return stored


def stored_dinov3(
    format: str,  # noqa: A002  # the name of the field
    tensors: Mapping[str, Tensor],
    heads: int | None,
    ignored: list[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    base: float = 100.0,
) -> StoredBackbone:
    """A DINOv3 whose architecture is inferred from tensors by our names.

    The periods of the rotary positions are computed from `base` in float32, as timm and transformers do. The
    released files have them rounded to bfloat16; load_backbone(stored_periods=True) takes those.

    Args:
        format: its name.
        tensors: by our names; without periods they are added.
        heads: the number of attention heads, if it is known.
        ignored: other content of the file, in words.
        mean: of the images, if known, and `std`; else those of ImageNet.
        std: see `mean`.
        size: of the images in pixels; None: 256, as in DINOv3's own examples.
        base: of the periods.

    Raises:
        ValueError: if the architecture cannot be inferred.
    """
    config, notes = infer_config(tensors, heads)
    config.size, config.rope_base = size or config.size, base
    named, own_periods = dict(tensors), tensors.get(PERIODS)
    if config.qkv_bias == "no_keys":
        _drop_key_biases(named, config.width)
    computed = periods(config.width // config.heads, base)
    alternatives = {}
    if own_periods is None:
        named[PERIODS] = computed
    elif own_periods.device.type != "meta" and len(own_periods) == len(computed):
        alternatives[PERIODS] = own_periods
        if torch.allclose(own_periods.float(), computed, rtol=ROUNDED, atol=0):
            named[PERIODS] = computed
        else:
            notes.append(f"Its periods are not those of base {base:g}: they are taken as they are.")
    if mean is None or std is None:
        mean, std = (MEAN, STD) if config.channels == 3 else ((0.5,) * config.channels,) * 2
        if config.channels != 3:
            notes.append(f"Mean and deviation of {config.channels} channels are not known: 0.5 is assumed.")
    notes.append(DINOV3_NOTE)
    shown = Input(config.size, tuple(map(float, mean)), tuple(map(float, std)))
    section = {"name": "dinov3", **asdict(config)}
    return StoredBackbone(
        format, named, section, shown, ignored, notes, licence=DINOV3_LICENCE, alternatives=alternatives
    )


def infer_config(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[Config, list[str]]:
    """The Config of the DINOv3 with these tensors, and notes about what was assumed.

    Raises:
        ValueError: if it cannot be inferred.
    """
    width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError(f"its patches are not square, but {' x '.join(map(str, patch))}")
    notes = []
    if heads is None:
        head = 128 if width == 4096 else 64
        if width % head:
            raise ValueError(
                f"it does not contain the number of attention heads, and its width, {width}, is no multiple "
                f"of {head}: give heads=N"
            )
        heads = width // head
        notes.append(
            f"The file does not contain the number of heads: {heads} of {head} channels are assumed."
        )
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    first = "blocks.0.mlp.w1.weight" if "blocks.0.mlp.w1.weight" in tensors else "blocks.0.mlp.fc1.weight"
    if first not in tensors:
        raise ValueError(f"it has no {first}, which gives the width of its feed-forward nets")
    has_bias = "blocks.0.attn.qkv.bias" in tensors
    return Config(
        channels=channels,
        width=width,
        depth=max(numbers) + 1,
        heads=heads,
        patch=patch[0],
        ffn="swiglu" if ".w1." in first else "mlp",
        hidden=tensors[first].shape[0],
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,
        registers=tensors["storage_tokens"].shape[1] if "storage_tokens" in tensors else 0,
        mask_token="mask_token" in tensors,
        qkv_bias="none" if not has_bias else "no_keys" if "blocks.0.attn.qkv.bias_mask" in tensors else "all",
        untied_cls_norm="cls_norm.weight" in tensors,
        untied_local_norm="local_cls_norm.weight" in tensors,
    ), notes


def _drop_key_biases(named: dict[str, Tensor], width: int) -> None:
    """Set the biases of keys to zero, whatever the file has, and their masks to what they mean; in place."""
    ones, zeros = torch.ones(width), torch.zeros(width)
    mask = torch.cat([ones, zeros, ones])
    for name, value in list(named.items()):
        if name.endswith(".attn.qkv.bias_mask") and value.shape == mask.shape:
            named[name] = mask
        elif name.endswith(".attn.qkv.bias") and value.shape == mask.shape and value.device.type != "meta":
            named[name] = torch.where(mask.bool(), value, torch.zeros((), dtype=value.dtype))


def section_in(file: Checkpoint) -> dict[str, Any]:
    """The section `backbone` that our exports put in the metadata of other formats; {} if there is none."""
    try:
        return dict(json.loads(file.metadata.get("dinokit_backbone", "{}")))
    except (TypeError, ValueError, RecursionError):
        return {}  # native.add_metadata() reports it


def write(vit: DINOv3, out: Path, size: int | None = None) -> Exported:
    """Write the pretrain file: a flat dict of tensors."""
    save_tensors(vit.state_dict(), out)
    config = vit.config
    unsaid = {"norm_eps": 1e-5, "rope_sides": "separate"}
    wrong = [
        f"{key}={getattr(config, key)}" for key, usual in unsaid.items() if getattr(config, key) != usual
    ]
    notes = [f"The file has no place for {', '.join(wrong)}: its readers assume others."] if wrong else []
    return opened(out, lambda tensors: DINOv3(infer_config(tensors, vit.heads)[0]), notes, every_size=True)
