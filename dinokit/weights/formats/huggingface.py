"""Hugging Face: Dinov2Model, Dinov2WithRegistersModel, and ViTModel for DINO.

Files have the names that transformers writes; the names that its models have in memory since version 5 are
read too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinokit.models import Backbone
from dinokit.models.block import NORM_EPS
from dinokit.models.vit import VisionTransformer
from dinokit.runtime.files import write_text
from dinokit.weights.architecture import StoredBackbone, count_groups, stored_vit
from dinokit.weights.checkpoint import Checkpoint, write_tensors
from dinokit.weights.formats import Exported, metadata_of

if TYPE_CHECKING:
    from PIL import Image

PREFIX = re.compile(r"^(?:dinov2|dinov2_with_registers|vit)\.")
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK = {  # Dinov2Model's names in files; then ViTModel's, and those that models have in memory
    "attention.attention.query": "attn.q", "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v", "attention.output.dense": "attn.proj",
    "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12", "mlp.weights_out": "mlp.w3",
    "layernorm_before": "norm1", "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "attention.q_proj": "attn.q", "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v", "attention.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3",
}  # fmt: skip
MERGED = (("attn.qkv", ("attn.q", "attn.k", "attn.v")), ("mlp.w12", ("mlp.w1", "mlp.w2")))  # along the rows
NAME = re.compile(r"^(?:encoder\.layers?|layers?)\.(\d+)\.(.+?)(\.weight|\.bias|)$")


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A model of transformers, with or without a classifier around it."""
    named = {PREFIX.sub("", name): value for name, value in file.tensors.items()}
    known = {our_name(name): name for name in named}
    if "embeddings.cls_token" not in named or "blocks.0.attn.q.weight" not in known:
        return None
    tensors = merge_projections({new: named[old] for new, old in known.items() if new})
    act, kind = file.config.get("hidden_act", "gelu"), file.config.get("model_type", "")
    if act != "gelu":
        raise ValueError(f"its config.json has hidden_act={act}, and the vit has gelu")
    rest = [name for name in named if not our_name(name)]
    # A classifier on a ViTModel means that it was trained with labels.
    outer = ("pooler.",) if kind == "vit" else ("pooler.", "classifier.")
    ignored = [name for name in rest if name.startswith(outer)]
    tensors |= {name: named[name] for name in rest if name not in ignored}
    architecture = ", ".join(file.config.get("architectures") or [kind or "Dinov2Model or similar"])
    stored = stored_vit(
        f"Hugging Face, {architecture}",
        tensors,
        heads or file.config.get("num_attention_heads"),
        count_groups(ignored) + file.other_keys,
        file.processor.get("image_mean"),
        file.processor.get("image_std"),
        crop_size(file.processor),
    )
    eps = file.config.get("layer_norm_eps", 1e-6)
    if eps != 1e-6:
        stored.notes.append(f"Its config.json has layer_norm_eps={eps}; the vit has 1e-6, as DINO.")
    return stored


def our_name(
    name: str, pattern: re.Pattern[str] = NAME, block: Mapping[str, str] = BLOCK, top: Mapping[str, str] = TOP
) -> str:
    """Our name of a tensor, with q, k and v separate; '' if it is not part of a backbone.

    Args:
        name: theirs.
        pattern: of names in a block: its number, the name inside of it, and .weight, .bias or nothing.
        block: their names inside of a block, and ours.
        top: their names outside of blocks, whole or without .weight and .bias, and ours.
    """
    if match := pattern.match(name):
        number, what, kind = match.groups()
        return f"blocks.{number}.{block[what]}{kind}" if what in block else ""
    stem, dot, kind = name.rpartition(".")
    return top.get(name, f"{top[stem]}{dot}{kind}" if stem in top else "")


def merge_projections(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values, and the two halves of a SwiGLU, as one matrix each."""
    merged = dict(tensors)
    for name in tensors:
        block, _, rest = name.partition(".attn.q." if ".attn.q." in name else ".mlp.w1.")
        for whole, parts in MERGED:
            names = [f"{block}.{part}.{rest}" for part in parts]
            if name == names[0] and all(n in merged for n in names):
                merged[f"{block}.{whole}.{rest}"] = torch.cat([merged.pop(n) for n in names])
    if "mask_token" in merged:
        merged["mask_token"] = merged["mask_token"].reshape(1, -1)  # ViTModel has one dimension more
    return merged


def crop_size(processor: Mapping[str, object]) -> int | None:
    """The side in pixels of the images that a preprocessor_config.json makes; None if it does not say."""
    size = processor.get("crop_size") or processor.get("size")
    side = size.get("height") if isinstance(size, dict) else size
    return side if isinstance(side, int) else None


def write(vit: VisionTransformer, out: Path, size: int | None = None) -> Exported:
    """Write a folder for AutoModel.from_pretrained and AutoImageProcessor.from_pretrained.

    A vit with registers becomes a Dinov2WithRegistersModel, any other a Dinov2Model; one without LayerScale
    gets scales of 1, which is equal.
    """
    notes = []
    if vit.registers and not hasattr(vit, "mask_token"):
        notes.append(
            "Dinov2WithRegistersModel has a mask token, and the vit has none: it is written as zeros."
        )
    if vit.channels != 3:
        notes.append(
            f"AutoImageProcessor makes RGB; for {vit.channels} channels images must be prepared by hand."
        )
    return write_folder(vit, out, _config(vit), to_huggingface(vit), vit.registers, notes)


def write_folder(
    net: Backbone, out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], registers: int,
    notes: Sequence[str] = (), every_size: bool = False,
) -> Exported:  # fmt: skip
    """Write the folder of a model of transformers with this config.json and these tensors, and open it.

    Raises:
        ValueError: if transformers does not take all of the tensors, or misses some.
        RuntimeError: if transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise RuntimeError("to=hf needs transformers: pip install '.[huggingface]' in the clone") from None
    write_text(out / "config.json", json.dumps(config, indent=2))
    write_text(out / "preprocessor_config.json", json.dumps(_processor(net), indent=2))
    write_tensors(out / "model.safetensors", tensors, metadata_of(net))
    shows, progress = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging
    progress.disable_progress_bar()  # of a second, among the lines of the command
    try:
        model, report = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    finally:
        if shows:
            progress.enable_progress_bar()
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"transformers {transformers.__version__} does not take all of it: {wrong}.")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    model.eval()

    def prepare(image: "Image.Image") -> Tensor:
        return torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        rows = model(images).last_hidden_state
        return rows[:, 0], rows[:, 1 + registers :]

    command = "transformers.AutoModel.from_pretrained('PATH')"
    shown = prepare if net.channels == 3 else None
    return Exported(command, forward, every_size=every_size, notes=[*notes], prepare=shown)


def to_huggingface(vit: VisionTransformer) -> dict[str, Tensor]:
    """Our tensors by the names in Hugging Face's files."""
    top = {ours: name for name, ours in TOP.items()}
    block = {ours: name for name, ours in reversed(BLOCK.items())}  # of several names take the first
    tensors: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if ".attn.qkv." in name:
            tensors |= {name.replace("qkv", x): t for x, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            tensors[name] = tensor
    renamed = with_their_names(tensors, top, "encoder.layer", block)
    for i in range(len(vit.blocks)):
        for j in (1, 2):
            renamed.setdefault(f"encoder.layer.{i}.layer_scale{j}.lambda1", torch.ones(vit.width))
    if vit.registers:
        renamed.setdefault("embeddings.mask_token", torch.zeros(1, vit.width))
    return renamed


def with_their_names(
    tensors: Mapping[str, Tensor], top: Mapping[str, str], layers: str, block: Mapping[str, str]
) -> dict[str, Tensor]:
    """Copies of tensors by the names in Hugging Face's files.

    Args:
        tensors: by our names, with q, k and v separate.
        top: our names outside of blocks, whole or without `.weight` and `.bias`, and theirs.
        layers: what they call the list of blocks.
        block: our names inside of a block, and theirs.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := re.match(r"^blocks\.(\d+)\.(.+?)(\.weight|\.bias|)$", name):
            new = f"{layers}.{match[1]}.{block[match[2]]}{match[3]}"
        else:
            stem, _, kind = name.rpartition(".")
            new = top.get(name) or f"{top[stem]}.{kind}"
        renamed[new] = tensor.detach().cpu().clone()
    return renamed


def _config(vit: VisionTransformer) -> dict[str, object]:
    swiglu = hasattr(vit.blocks[0].mlp, "w12")
    more: dict[str, object] = {"use_mask_token": hasattr(vit, "mask_token")}
    if vit.registers:
        more = {"num_register_tokens": vit.registers}
    return {
        "architectures": ["Dinov2WithRegistersModel" if vit.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if vit.registers else "dinov2",
        "hidden_size": vit.width,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.heads,
        "num_channels": vit.channels,
        "image_size": vit.side * vit.patch,
        "patch_size": vit.patch,
        "mlp_ratio": 4,
        "use_swiglu_ffn": swiglu,
        "layer_norm_eps": NORM_EPS,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "dtype": "float32",
        **more,
    }


def _processor(net: Backbone) -> dict[str, object]:
    """The preprocessor_config.json that prepares images as dinokit does."""
    side = net.input.size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": net.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(side * 256 / 224)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": net.input.mean,
        "image_std": net.input.std,
    }
