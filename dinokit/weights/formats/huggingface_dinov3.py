"""Hugging Face's files of DINOv3's Vision Transformers: DINOv3ViTModel.

Files have the names that transformers writes; those that its models have in memory are read too.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.models.dinov3 import DINOv3
from dinokit.weights.architecture import StoredBackbone, count_groups
from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats import Exported
from dinokit.weights.formats.dinov3 import section_in, stored_dinov3
from dinokit.weights.formats.huggingface import crop_size, our_name, with_their_names, write_folder

PREFIX = re.compile(r"^(?:dinov3_vit|backbone|model(?=\.(?:embeddings|norm|model)\.))\.")
NAME = re.compile(r"^(?:model\.)?layer\.(\d+)\.(.+?)(\.weight|\.bias|)$")
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "norm": "norm",
}
BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma", "attention.q_proj": "attn.q", "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v", "attention.o_proj": "attn.proj",
}  # fmt: skip
MLP = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
GATED = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
SIZE = 224  # pixels to which DINOv3ViTImageProcessor resizes if nothing says otherwise
ACTIVATION = {True: "silu", False: "gelu"}  # of a gated feed-forward net, and of another


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A DINOv3ViTModel, alone or in a classifier."""
    named = {PREFIX.sub("", name): value for name, value in file.tensors.items()}
    blocks = [m for name in named if (m := NAME.match(name))]
    if "embeddings.patch_embeddings.weight" not in named or not blocks:
        return None
    gated = any(match[2] == "mlp.gate_proj" for match in blocks)
    block = {**BLOCK, **(GATED if gated else MLP)}
    known = {name: our_name(name, NAME, block, TOP) for name in named}
    act = file.config.get("hidden_act", ACTIVATION[gated])
    if act != ACTIVATION[gated]:
        raise ValueError(f"its config.json has hidden_act={act}, and dinov3 has {ACTIVATION[gated]}")
    rest = [name for name in named if not known[name]]
    ignored = [name for name in rest if name.startswith(("classifier.", "pooler."))]
    tensors = {ours: named[name] for name, ours in known.items() if ours}
    tensors |= {name: named[name] for name in rest if name not in ignored}
    _merge(tensors)
    kind = ", ".join(file.config.get("architectures") or ["DINOv3ViTModel"])
    shown, (size, why) = file.processor, _size(file)
    stored = stored_dinov3(
        f"Hugging Face, {kind}",
        tensors,
        heads or file.config.get("num_attention_heads") or section_in(file).get("heads"),
        count_groups(ignored) + file.other_keys,
        shown.get("image_mean"),
        shown.get("image_std"),
        size,
        _base(file),
    )
    stored.notes += [why] if why else []
    stored.section["norm_eps"] = file.config.get("layer_norm_eps", 1e-5)
    return stored


def _size(file: Checkpoint) -> tuple[int, str]:
    """The side in pixels of the images of the model; and why, if no preprocessor_config.json says it."""
    if known := crop_size(file.processor):
        return known, ""
    given: Any = file.config.get("image_size")
    side: Any
    side, *others = given if isinstance(given, list) and given else [given]
    why = "as image_size in config.json says"
    if type(side) is not int or side < 1 or others not in ([], [side]):
        side, why = SIZE, "to which DINOv3's image processor of transformers resizes"
    return side, f"No preprocessor_config.json says the size of images: {side} pixels, {why}."


def _base(file: Checkpoint) -> float:
    rope = file.config.get("rope_parameters") or {}
    base = file.config.get("rope_theta") or rope.get("rope_theta") or section_in(file).get("rope_base")
    return float(base or 100.0)


def _merge(tensors: dict[str, Tensor]) -> None:
    """Queries, keys and values as one matrix and one bias, in place; keys may have no bias."""
    for name in [name for name in tensors if name.endswith(".attn.q.weight")]:
        attn = name.removesuffix("q.weight")
        for kind in ("weight", "bias"):
            q, k, v = (tensors.get(f"{attn}{x}.{kind}") for x in "qkv")
            if q is None or v is None or (k is None and kind == "weight"):
                continue
            tensors[f"{attn}qkv.{kind}"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
            if k is None:
                tensors[f"{attn}qkv.bias_mask"] = torch.empty(3 * len(q))  # the reader sets it
            for x in "qkv":
                tensors.pop(f"{attn}{x}.{kind}", None)
    if "mask_token" in tensors:
        tensors["mask_token"] = tensors["mask_token"].reshape(1, -1)
    if "storage_tokens" in tensors and not tensors["storage_tokens"].shape[1]:
        del tensors["storage_tokens"]


def write(vit: DINOv3, out: Path, size: int | None = None) -> Exported:
    """Write a folder for AutoModel.from_pretrained and AutoImageProcessor.from_pretrained.

    Raises:
        ValueError: if transformers has no such model.
    """
    config = vit.config
    if config.rope_sides != "separate" or config.untied_cls_norm:
        raise ValueError("DINOv3ViTModel has only rope_sides=separate and untied_cls_norm=false.")
    notes = []
    if config.untied_local_norm:
        notes.append("DINOv3ViTModel has no place for local_cls_norm, which only training uses: left out.")
    tensors = to_huggingface(vit)
    return write_folder(vit, out, _config(vit), tensors, vit.registers, notes, every_size=True)


def to_huggingface(vit: DINOv3) -> dict[str, Tensor]:
    """Our tensors by the names in Hugging Face's files; what a model lacks is added as it has no effect."""
    gated = vit.config.ffn == "swiglu"
    top = {ours: name for name, ours in TOP.items()}
    block = {ours: name for name, ours in {**BLOCK, **(GATED if gated else MLP)}.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if ".attn.qkv." in name and not name.endswith("bias_mask"):
            parts = dict(zip("qkv", tensor.chunk(3), strict=True))
            if name.endswith("bias") and vit.config.qkv_bias == "no_keys":
                del parts["k"]
            tensors |= {name.replace("qkv", x): t for x, t in parts.items()}
        elif not name.endswith((".periods", ".bias_mask")) and not name.startswith("local_cls_norm."):
            tensors[name] = tensor
    for i in range(len(vit.blocks)):
        for j in (1, 2):
            tensors.setdefault(f"blocks.{i}.ls{j}.gamma", torch.ones(vit.width))
    tensors.setdefault("mask_token", torch.zeros(1, vit.width))
    tensors["mask_token"] = tensors["mask_token"].reshape(1, 1, -1)
    tensors.setdefault("storage_tokens", torch.zeros(1, 0, vit.width))
    return with_their_names(tensors, top, "layer", block)


def _config(vit: DINOv3) -> dict[str, Any]:
    config, gated = vit.config, vit.config.ffn == "swiglu"
    first = vit.get_parameter(f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight")
    biased = config.qkv_bias != "none"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": vit.width,
        "intermediate_size": first.shape[0],
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.heads,
        "num_channels": vit.channels,
        "num_register_tokens": vit.registers,
        "image_size": config.size,
        "patch_size": vit.patch,
        "hidden_act": ACTIVATION[gated],
        "use_gated_mlp": gated,
        "layer_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "query_bias": biased,
        "key_bias": config.qkv_bias == "all",
        "value_bias": biased,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": 1.0,
        "pos_embed_shift": config.rope_shift or None,
        "pos_embed_jitter": config.rope_jitter if config.rope_jitter > 1 else None,
        "pos_embed_rescale": config.rope_rescale if config.rope_rescale > 1 else None,
        "dtype": "float32",
        "license": vit.licence,
    }
