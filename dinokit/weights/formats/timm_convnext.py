"""The files of DINOv3's ConvNeXts (arXiv 2508.10104): its own, timm's, and Hugging Face's.

One table of names serves all three. Only the sizes that were released are read: tiny, small, base and large.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dinokit.models import Input
from dinokit.weights.architecture import (
    DINOV3_LICENCE,
    DINOV3_NOTE,
    MEAN,
    STD,
    StoredBackbone,
    backbone_tensors,
    count_groups,
)
from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats import Exported, metadata_of
from dinokit.weights.formats.huggingface import crop_size
from dinokit.weights.formats.timm import write_model

if TYPE_CHECKING:
    from dinokit.models.timm_convnext import TimmConvNeXt  # users of torch.hub may lack timm

SIZES = {  # (width of the first stage, blocks of the third): timm's name
    (96, 9): "convnext_tiny", (96, 27): "convnext_small", (128, 27): "convnext_base",
    (192, 27): "convnext_large",
}  # fmt: skip
FIRST = "net.stem.0.weight"
Names = tuple[tuple[str, str], ...]  # pattern, replacement
OWN: Names = (  # names of the official files -> timm's
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
)
HUGGINGFACE: Names = (  # names in files of transformers, whose models in memory put `model.` before stages
    (r"^(?:dinov3_convnext\.)?(?:model\.)?(?=stages\.)", ""),
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsample_layers\.", ".downsample."),
    (r"^stages\.(\d)\.layers\.", r"stages.\1.blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"(?<=\d)\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv([12])\.", r".mlp.fc\1."),
    (r"^layer_norm\.", "head.norm."),
)


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A ConvNeXt without a classifier: one that was trained with labels is no backbone of DINO."""
    tensors, ignored = backbone_tensors(file.tensors)
    config = file.config
    table: Names
    if "downsample_layers.0.0.weight" in tensors and "norms.3.weight" in tensors:
        kind, table = "DINOv3 ConvNeXt, pretrain file", OWN
        # The last of four norms is an alias of the final one.
        tensors = {name: value for name, value in tensors.items() if not name.startswith("norms.")}
    elif any(name.endswith("stages.0.downsample_layers.0.weight") for name in tensors):
        kind, table = "Hugging Face, DINOv3ConvNextModel", HUGGINGFACE
    elif {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "head.norm.weight"} <= set(tensors):
        kind, table = f"timm, {config.get('architecture', 'ConvNeXt')}", ()
        if any(name.startswith("head.fc.") for name in tensors):
            return None
        if config.get("architecture", "convnext_tiny") not in SIZES.values():
            return None  # a timm_any
    else:
        return None
    outer = [name for name in tensors if name.startswith(("classifier.", "pooler."))]
    named = {f"net.{renamed(n, table)}": t for n, t in tensors.items() if n not in outer}
    ignored += [*count_groups(outer), *file.other_keys]
    shown = config.get("pretrained_cfg") or {}
    mean = shown.get("mean") or file.processor.get("image_mean") or MEAN
    std = shown.get("std") or file.processor.get("image_std") or STD
    section = {"name": "timm_convnext", "model": _size(named), "channels": named[FIRST].shape[1]}
    size = (shown.get("input_size") or [3, None])[1] or crop_size(file.processor) or 256
    shown_input = Input(size, tuple(map(float, mean)), tuple(map(float, std)))
    return StoredBackbone(kind, named, section, shown_input, ignored, [DINOV3_NOTE], licence=DINOV3_LICENCE)


def renamed(name: str, table: Names) -> str:
    """A name after the replacements of a table, in turn."""
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def _size(named: dict[str, Tensor]) -> str:
    """Timm's name of a ConvNeXt with these tensors.

    Raises:
        ValueError: if DINOv3 released none of this size.
    """
    depth = len({m[1] for name in named if (m := re.match(r"net\.stages\.2\.blocks\.(\d+)\.", name))})
    width = named[FIRST].shape[0]
    if (width, depth) not in SIZES:
        raise ValueError(
            f"its first stage has {width} channels and its third {depth} blocks, and DINOv3's ConvNeXts have "
            + ", ".join(f"{w} and {d} ({name})" for (w, d), name in SIZES.items())
        )
    return SIZES[width, depth]


def write(net: "TimmConvNeXt", out: Path, size: int | None = None) -> Exported:
    """Write a folder for timm.create_model('local-dir:...'), or only a file if `out` is a .safetensors."""
    tensors = {name: value.detach().cpu().clone() for name, value in net.net.state_dict().items()}
    args = {"num_classes": 0, "in_chans": net.channels, "global_pool": "avg"}
    settings = {"first_conv": "stem.0", "classifier": "head.fc"}
    return write_model(
        net, out, net.model, args, tensors, metadata=metadata_of(net), read=_tokens, every_size=True,
        settings=settings,
    )  # fmt: skip


def _tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    last = model.forward_features(images)
    return model.forward_head(last), model.head.norm(last).flatten(2).transpose(1, 2)
