"""timm's files of DINOv3's Vision Transformers: `vit_*_dinov3*`, single or in a folder with config.json."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.models.dinov3 import DINOv3
from dinokit.weights.architecture import StoredBackbone, backbone_tensors
from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats import Exported, metadata_of
from dinokit.weights.formats.dinov3 import section_in, stored_dinov3
from dinokit.weights.formats.timm import write_model

NAMES = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}  # the largest width of each
OUR_NAMES = (  # timm's, ours
    ("reg_token", "storage_tokens"), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"),
    (".mlp.fc1_g.", ".mlp.w1."), (".mlp.fc1_x.", ".mlp.w2."),
)  # fmt: skip
DROPPED = ("rope_embed.periods", "mask_token", "local_cls_norm.weight", "local_cls_norm.bias")


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A ViT without positions, whose LayerScales are timm's `gamma_1` and `gamma_2`."""
    tensors, ignored = backbone_tensors(file.tensors)
    if "pos_embed" in tensors or not {"cls_token", "blocks.0.gamma_1", "blocks.0.attn.qkv.weight"} <= set(
        tensors
    ):
        return None
    if any(name.startswith(("head.", "fc_norm.")) for name in tensors):
        return None  # a classifier was trained with labels
    args, shown = file.config.get("model_args", {}), file.config.get("pretrained_cfg", {})
    kind = f"timm, {file.config['architecture']}" if "architecture" in file.config else "timm, DINOv3"
    size = shown.get("input_size", [3, None])[1]
    return stored_dinov3(
        kind,
        from_timm(tensors),
        heads or args.get("num_heads") or section_in(file).get("heads"),
        ignored + file.other_keys,
        shown.get("mean"),
        shown.get("std"),
        size,
        args.get("rope_temperature", section_in(file).get("rope_base", 100.0)),
    )


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for timm's tensors; its queries and values have biases of their own."""
    renamed: dict[str, Tensor] = {}
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    for name, value in tensors.items():
        for theirs, ours in OUR_NAMES:
            name = name.replace(theirs, ours)
        renamed[name.replace(".mlp.fc2.", ".mlp.w3.") if gated else name] = value
    for name in [name for name in renamed if name.endswith(".attn.q_bias")]:
        attn = name.removesuffix("q_bias")
        if f"{attn}v_bias" in renamed:
            q, v = renamed.pop(name), renamed.pop(f"{attn}v_bias")
            renamed[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
            renamed[f"{attn}qkv.bias_mask"] = torch.empty(3 * len(q))  # the reader sets it
    return renamed


def write(vit: DINOv3, out: Path, size: int | None = None) -> Exported:
    """Write a folder for timm.create_model('local-dir:...'), or only a file if `out` is a .safetensors.

    Raises:
        ValueError: if timm has no such model.
    """
    name, args = _model(vit)
    lost = [name for name in DROPPED if name in vit.state_dict() and "periods" not in name]
    notes = [f"timm has no place for {', '.join(lost)}: left out."] if lost else []
    metadata = metadata_of(vit)
    return write_model(vit, out, name, args, to_timm(vit), notes, metadata=metadata, every_size=True)


def to_timm(vit: DINOv3) -> dict[str, Tensor]:
    """Our tensors by timm's names; the reverse of from_timm()."""
    renamed: dict[str, Tensor] = {}
    for name, value in vit.state_dict().items():
        if name in DROPPED or name.endswith(".bias_mask"):
            continue
        tensor = value.detach().cpu().clone()
        if name.endswith(".attn.qkv.bias"):
            attn = name.removesuffix("qkv.bias")
            q, _, v = tensor.chunk(3)
            renamed |= {f"{attn}q_bias": q.clone(), f"{attn}v_bias": v.clone()}
            continue
        for theirs, ours in OUR_NAMES:
            name = name.replace(ours, theirs)
        renamed[name.replace(".mlp.w3.", ".mlp.fc2.")] = tensor
    return renamed


def _model(vit: DINOv3) -> tuple[str, dict[str, Any]]:
    """The name of the most similar model of timm, and the arguments that make it this one."""
    config = vit.config
    needed: dict[str, tuple[Any, ...]] = {
        "norm_eps": (1e-5,), "rope_sides": ("separate",), "untied_cls_norm": (False,),
        "qkv_bias": ("no_keys", "none"),
    }  # fmt: skip
    for key, allowed in needed.items():
        if getattr(config, key) not in allowed:
            raise ValueError(
                f"timm has no DINOv3 with backbone.{key}={getattr(config, key)}, only with "
                f"{' or '.join(map(str, allowed))}."
            )
    word = next((word for width, word in NAMES.items() if vit.width <= width), "7b")
    biased = config.qkv_bias == "no_keys"
    swiglu = config.ffn == "swiglu"
    hidden = vit.get_parameter(f"blocks.0.mlp.{'w1' if swiglu else 'fc1'}.weight").shape[0]
    args: dict[str, Any] = {
        "num_classes": 0,
        "in_chans": vit.channels,
        "img_size": config.size,
        "patch_size": vit.patch,
        "embed_dim": vit.width,
        "depth": len(vit.blocks),
        "num_heads": vit.heads,
        "mlp_ratio": (hidden + 0.5) / vit.width,  # timm rounds the product down
        "swiglu_mlp": swiglu,
        "swiglu_align_to": int(swiglu),
        "init_values": 1e-5 if config.layer_scale else None,
        "qkv_bias": biased,
        "num_reg_tokens": vit.registers,
        "rope_temperature": config.rope_base,
        "dynamic_img_size": True,
        "global_pool": "token",
    }
    return f"vit_{word}_patch16_dinov3{'_qkvb' if biased and word != '7b' else ''}", args
