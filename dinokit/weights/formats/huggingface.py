"""Hugging Face: Dinov2Model, Dinov2WithRegistersModel, and ViTModel, which carries DINO there.

Files have the names that transformers wrote until its version 5, and still writes; the names that its models
have had in memory since then are read too.
"""

import re

import torch
from torch import Tensor

from dinokit.backbones import Input
from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats._names import groups
from dinokit.weights.found import Found, anatomy, found_vit, shown_size

PREFIX = re.compile(r"^(?:dinov2|dinov2_with_registers|vit)\.")
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK = {
    "attention.attention.query": "attn.q", "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v", "attention.output.dense": "attn.proj",
    "attention.q_proj": "attn.q", "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v", "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "norm1": "norm1", "norm2": "norm2",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12", "mlp.weights_out": "mlp.w3",
    "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3",
}  # fmt: skip
JOINED = (("attn.qkv", ("attn.q", "attn.k", "attn.v")), ("mlp.w12", ("mlp.w1", "mlp.w2")))  # along the rows
NAME = re.compile(r"^(?:encoder\.layers?|layers?)\.(\d+)\.(.+?)(\.weight|\.bias|)$")


def read(file: Checkpoint, heads: int | None) -> Found | None:
    """A model of transformers, with or without a classifier around it."""
    named = {PREFIX.sub("", name): value for name, value in file.tensors.items()}
    known = {our_name(name): name for name in named}
    if "embeddings.cls_token" not in named or "blocks.0.attn.q.weight" not in known:
        return None
    tensors = joined({new: named[old] for new, old in known.items() if new})
    act, kind = file.config.get("hidden_act", "gelu"), file.config.get("model_type", "")
    if act != "gelu":
        raise ValueError(f"its config.json says hidden_act={act}, and the vit has gelu")
    rest = [name for name in named if not our_name(name)]
    outer = ("pooler.",) if kind == "vit" else ("pooler.", "classifier.")  # a ViT's tells of other training
    beside = [name for name in rest if name.startswith(outer)]
    tensors |= {name: named[name] for name in rest if name not in beside}
    heads = heads or file.config.get("num_attention_heads")
    about = file.processor
    shown = None
    if {"image_mean", "image_std"} <= set(about):
        config = anatomy(tensors, heads)[0]
        shown = Input(
            _crop(about) or shown_size(config),
            tuple(map(float, about["image_mean"])),
            tuple(map(float, about["image_std"])),
        )
    architecture = ", ".join(file.config.get("architectures") or [kind or "Dinov2Model or a like one"])
    found = found_vit(f"Hugging Face, {architecture}", tensors, heads, shown, groups(beside) + file.beside)
    eps = file.config.get("layer_norm_eps", 1e-6)
    if eps != 1e-6:
        found.notes.append(f"Its config.json says layer_norm_eps={eps}; the vit has 1e-6, as DINO trained.")
    if file.config.get("hidden_act", "gelu") != "gelu":
        found.notes.append(f"Its config.json says hidden_act={file.config['hidden_act']}; GELU is used here.")
    return found


def our_name(name: str) -> str:
    """Our name of a tensor, or '' if it belongs to no backbone; q, k and v are still apart."""
    match = NAME.match(name)
    if match:
        number, what, kind = match.groups()
        return f"blocks.{number}.{BLOCK[what]}{kind}" if what in BLOCK else ""
    stem, dot, kind = name.rpartition(".")
    return TOP.get(name, f"{TOP[stem]}{dot}{kind}" if stem in TOP else "")


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values, and the two halves of a SwiGLU, as one matrix each."""
    done = dict(tensors)
    for name in tensors:
        block, _, rest = name.partition(".attn.q." if ".attn.q." in name else ".mlp.w1.")
        for whole, parts in JOINED:
            names = [f"{block}.{part}.{rest}" for part in parts]
            if name == names[0] and all(n in done for n in names):
                done[f"{block}.{whole}.{rest}"] = torch.cat([done.pop(n) for n in names])
    if "mask_token" in done:
        done["mask_token"] = done["mask_token"].reshape(1, -1)  # ViTModel has one dimension more
    return done


def _crop(processor: dict[str, object]) -> int | None:
    size = processor.get("crop_size") or processor.get("size")
    side = size.get("height") if isinstance(size, dict) else size
    return side if isinstance(side, int) else None
