"""The files of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193): backbones and checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from dinokit.models.vit import VisionTransformer
from dinokit.weights.architecture import (
    HEAD,
    StoredBackbone,
    backbone_tensors,
    infer_config,
    is_vit,
    stored_vit,
)
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint
from dinokit.weights.export_check import Exported, heads_of, two_sizes


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """DINOv2: a ViT with a mask token or registers."""
    tensors, ignored = backbone_tensors(file.tensors)
    if not is_vit(tensors) or not {"mask_token", "register_tokens"} & set(tensors):
        return None
    with_registers = " with registers" if "register_tokens" in tensors else ""
    kind = f"DINOv2{with_registers}, {'training dump' if file.wrapper or ignored else 'pretrain file'}"
    return stored_vit(kind, tensors, heads, None, [*ignored, *file.other_keys])


def read_dino(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """DINO: a ViT without LayerScale, registers and mask token; timm's copies have the same tensors."""
    tensors, ignored = backbone_tensors(file.tensors)
    others = ("mask_token", "register_tokens", "reg_token", "blocks.0.ls1.gamma")
    if "architecture" in file.config or not is_vit(tensors) or any(name in tensors for name in others):
        return None
    kind = "DINO, full checkpoint" if file.wrapper else "DINO, pretrain file (timm's have the same tensors)"
    return stored_vit(kind, tensors, heads, None, [*ignored, *file.other_keys])


def write(vit: VisionTransformer, out: Path, size: int | None = None) -> Exported:
    """Write the pretrain file: a flat dict of tensors, by torch.save.

    Args:
        vit: to write; a DINO backbone has the names of DINO's own file.
        out: the new file.
        size: not used; it is for ONNX.
    """
    torch.save({name: tensor.cpu().clone() for name, tensor in vit.state_dict().items()}, out)
    heads, official = heads_of(vit), (0.0, True) if vit.registers else (0.1, False)
    notes = []
    if vit.width != HEAD * heads:
        notes.append(
            f"The file has no place for the number of heads, {heads}: its readers assume {HEAD} channels per "
            f"head. load_backbone needs heads={heads}."
        )
    if (vit.offset, vit.antialias) != official:
        notes.append(
            f"The file has no place for the resampling of positions, offset={vit.offset}, "
            f"antialias={vit.antialias}: its readers use {official[0]}, {official[1]}."
        )
    tensors = open_checkpoint(out).tensors
    again = VisionTransformer(infer_config(tensors, heads)[0]).eval()  # as its readers build it
    again.load_state_dict(tensors, strict=True)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = again([images], [None])[0]
        return tokens.cls, tokens.patches

    return Exported(
        lambda path: f"dinokit.weights.load_backbone('{path}'), or torch.hub.load(..., weights='{path}')",
        forward,
        two_sizes(vit),
        notes=notes,
    )
