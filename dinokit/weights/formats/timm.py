"""timm's files: `vit_*_dinov2*` and `vit_*.dino`, single or in a folder with config.json."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.models.vit import VisionTransformer
from dinokit.runtime.files import write_text
from dinokit.weights.architecture import StoredBackbone, backbone_tensors, is_vit, stored_vit
from dinokit.weights.checkpoint import Checkpoint, read_safetensors, write_tensors
from dinokit.weights.formats import Exported, metadata_of

NAMES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # the largest width of each name
# Names in a ViT without a classifier, and without norms and pools that a `vit` has no place for.
PLAIN = re.compile(
    r"(cls_token|pos_embed|reg_token|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|"
    r"mlp\.fc[12]|ls[12]))\..*)$"
)
PACKED = re.compile(r"^(blocks\.\d+\.mlp)\.fc([12])\.")


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A ViT without a mask token. LayerScale, registers or config.json distinguish it from DINO's file."""
    tensors, ignored = backbone_tensors(file.tensors)
    if not is_vit(tensors) or "mask_token" in tensors:
        return None
    if not ("architecture" in file.config or {"reg_token", "blocks.0.ls1.gamma"} & set(tensors)):
        return None
    if "architecture" in file.config and not all(map(PLAIN.match, tensors)):
        return None  # a timm_any
    tensors = from_timm(tensors)
    heads = heads or file.config.get("model_args", {}).get("num_heads")
    shown = file.config.get("pretrained_cfg", {})
    kind = f"timm, {file.config['architecture']}" if "architecture" in file.config else "timm"
    ignored += file.other_keys
    return stored_vit(kind, tensors, heads, ignored, shown.get("mean"), shown.get("std"))


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for timm's tensors; its cls_token includes the position, fc1, fc2 may be a packed SwiGLU."""
    renamed = dict(tensors)
    if "reg_token" in renamed:
        renamed["register_tokens"] = renamed.pop("reg_token")
    position = renamed["pos_embed"]
    if round(position.shape[1] ** 0.5) ** 2 == position.shape[1]:  # without the class token
        renamed["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    first, second = (renamed.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        new = {"1": "w12", "2": "w3"}
        renamed = {
            PACKED.sub(lambda m: f"{m[1]}.{new[m[2]]}.", name): value for name, value in renamed.items()
        }
    return renamed


def write(vit: Any, out: Path, size: int | None = None) -> Exported:
    """Write a folder for timm.create_model('local-dir:...'), or only a file if `out` is a .safetensors.

    `vit` is a VisionTransformer of ours or a TimmViT.
    """
    ours = isinstance(vit, VisionTransformer)
    name, args = _model(vit) if ours else _own_model(vit)
    tensors = to_timm(vit.state_dict() if ours else vit.net.state_dict())
    notes = ["timm has no mask token: it is left out."] if hasattr(vit, "mask_token") else []
    return write_model(vit, out, name, args, tensors, notes, metadata=metadata_of(vit) if ours else {})


def tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens (b, D) and patches (b, N, D) of a ViT of timm."""
    rows = model.forward_features(images)
    return rows[:, 0], rows[:, model.num_prefix_tokens :]


def write_model(
    net: Any, out: Path, name: str, args: dict[str, Any], tensors: Mapping[str, Tensor],
    notes: Sequence[str] = (), *, metadata: Mapping[str, str],
    read: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = tokens, every_size: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Exported:  # fmt: skip
    """Write tensors of timm's model `name` with these arguments, as write(), and open it.

    Args:
        net: the backbone that is exported.
        out: a folder, or a .safetensors file.
        name: of the model in timm.
        args: of timm.create_model().
        tensors: by timm's names.
        notes: for Exported.
        metadata: of the file of tensors.
        read: of the opened model and images: class tokens and patches.
        every_size: for Exported.
        settings: entries of config.json's pretrained_cfg in place of those of a ViT.

    Raises:
        RuntimeError: if timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise RuntimeError("to=timm needs timm: pip install timm") from None
    model: Any
    only_file = out.suffix == ".safetensors"
    write_tensors(out if only_file else out / "model.safetensors", tensors, metadata)
    if only_file:
        model = timm.create_model(name, **args)
        model.load_state_dict(read_safetensors(out)[0], strict=True)
        call = f"timm.create_model('{name}', {', '.join(f'{key}={value!r}' for key, value in args.items())})"
        command = f"{call}.load_state_dict(safetensors.torch.load_file('PATH'))"
    else:
        write_text(out / "config.json", json.dumps(_config(net, name, args, settings or {}), indent=2))
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        command = "timm.create_model('local-dir:PATH', pretrained=True)"
    model.eval()
    data: Any = timm.data
    prepare = None if only_file else data.create_transform(**data.resolve_model_data_config(model))
    return Exported(command, partial(read, model), every_size=every_size, prepare=prepare, notes=[*notes])


def to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names as timm's; the reverse of from_timm()."""
    renamed = {name: t.detach().cpu().clone() for name, t in tensors.items() if name != "mask_token"}
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        position = renamed.pop("pos_embed")
        renamed["cls_token"] = renamed["cls_token"] + position[:, :1]
        renamed["pos_embed"] = position[:, 1:].contiguous()
    return {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): t
        for name, t in renamed.items()
    }


def _own_model(vit: Any) -> tuple[str, dict[str, Any]]:
    """The model of timm that a TimmViT is, and its arguments."""
    size = vit.net.patch_embed.img_size[0]
    return vit.model, {
        "num_classes": 0, "in_chans": vit.channels, "img_size": size, "dynamic_img_size": True,
        "global_pool": "token",
    }  # fmt: skip


def _model(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The name of the most similar model of timm, and the arguments that make it this one."""
    first: Any = vit.blocks[0]
    swiglu, scaled = hasattr(first.mlp, "w12"), hasattr(first.ls1, "gamma")
    word = next((word for width, word in NAMES.items() if vit.width <= width), "large")
    word = "small" if word == "tiny" and scaled else word  # DINOv2 has no tiny model
    name = f"vit_{'giant' if swiglu else word}_patch14{'_reg4' if vit.registers else ''}_dinov2"
    if not (swiglu or scaled or vit.registers):
        name = f"vit_{word}_patch16_224"
    args: dict[str, Any] = {
        "num_classes": 0,
        "in_chans": vit.channels,
        "img_size": vit.side * vit.patch,
        "patch_size": vit.patch,
        "embed_dim": vit.width,
        "depth": len(vit.blocks),
        "num_heads": vit.heads,
        "init_values": 1e-5 if scaled else None,
        "dynamic_img_size": True,
    }
    if swiglu:  # half a channel more: timm rounds the hidden width down
        args["mlp_ratio"] = (first.mlp.w12.out_features + 0.5) / vit.width
    if vit.registers:
        args |= {"reg_tokens": vit.registers, "no_embed_class": True}
    return name, args


def _config(net: Any, name: str, args: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    side = net.input.size
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": net.width,
        "global_pool": args.get("global_pool", "token"),
        "model_args": args,
        "pretrained_cfg": {
            "tag": "dinokit",
            "input_size": [net.channels, side, side],  # of the images that dinokit shows
            "mean": net.input.mean,
            "std": net.input.std,
            "interpolation": "bicubic",
            "crop_pct": side / (round(side * 256 / 224) + 0.5),  # timm rounds the quotient down
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"license": net.licence} if net.licence else {}),
            **settings,
        },
    }
