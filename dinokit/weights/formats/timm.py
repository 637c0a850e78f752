"""timm's files: `vit_*_dinov2*` and `vit_*.dino`, alone or in a folder with config.json."""

import re

import torch
from torch import Tensor

from dinokit.backbones import Input
from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats._names import backbone_tensors, is_vit
from dinokit.weights.found import Found, anatomy, found_vit, shown_size

PACKED = re.compile(r"^(blocks\.\d+\.mlp)\.fc([12])\.")


def read(file: Checkpoint, heads: int | None) -> Found | None:
    """A ViT without a mask token: LayerScale or registers, or timm's config.json, tell it from DINO's own."""
    tensors, beside = backbone_tensors(file.tensors)
    if not is_vit(tensors) or "mask_token" in tensors:
        return None
    if not ("architecture" in file.config or {"reg_token", "blocks.0.ls1.gamma"} & set(tensors)):
        return None
    tensors = ours(tensors)
    heads = heads or file.config.get("model_args", {}).get("num_heads")
    about = file.config.get("pretrained_cfg", {})
    shown = None
    if {"mean", "std"} <= set(about):
        size = shown_size(anatomy(tensors, heads)[0])
        shown = Input(size, tuple(map(float, about["mean"])), tuple(map(float, about["std"])))
    kind = f"timm, {file.config['architecture']}" if "architecture" in file.config else "timm"
    return found_vit(kind, tensors, heads, shown, [*beside, *file.beside])


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm as ours: the class token holds its own position, the packed SwiGLU is called fc1, fc2."""
    done = dict(tensors)
    if "reg_token" in done:
        done["register_tokens"] = done.pop("reg_token")
    position = done["pos_embed"]
    if round(position.shape[1] ** 0.5) ** 2 == position.shape[1]:  # patches alone
        done["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    first, second = (done.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        new = {"1": "w12", "2": "w3"}
        done = {PACKED.sub(lambda m: f"{m[1]}.{new[m[2]]}.", name): value for name, value in done.items()}
    return done
