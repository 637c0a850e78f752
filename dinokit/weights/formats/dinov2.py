"""The files of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193): backbones and checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dinokit.models import Backbone
from dinokit.models.vit import VisionTransformer
from dinokit.weights.architecture import (
    HEAD,
    StoredBackbone,
    backbone_tensors,
    infer_config,
    is_vit,
    stored_vit,
)
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint, save_tensors
from dinokit.weights.formats import Exported


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A ViT of DINOv2, which has a mask token or registers, or of DINO; timm's reader is asked before."""
    tensors, ignored = backbone_tensors(file.tensors)
    if not is_vit(tensors):
        return None
    if {"mask_token", "register_tokens"} & set(tensors):
        with_registers = " with registers" if "register_tokens" in tensors else ""
        kind = f"DINOv2{with_registers}, {'training dump' if file.wrapper or ignored else 'pretrain file'}"
    else:
        kind = "full checkpoint" if file.wrapper else "pretrain file (timm's have the same tensors)"
        kind = f"DINO, {kind}"
    return stored_vit(kind, tensors, heads, [*ignored, *file.other_keys])


def write(vit: VisionTransformer, out: Path, size: int | None = None) -> Exported:
    """Write the pretrain file: a flat dict of tensors. A DINO backbone has the names of DINO's own file."""
    save_tensors(vit.state_dict(), out)
    official = (0.0, True) if vit.registers else (0.1, False)
    notes = []
    if vit.width != HEAD * vit.heads:
        notes.append(
            f"The file has no place for the number of heads, {vit.heads}: its readers assume {HEAD} channels "
            f"per head. load_backbone needs heads={vit.heads}."
        )
    if (vit.offset, vit.antialias) != official:
        notes.append(
            f"The file has no place for the resampling of positions, offset={vit.offset}, "
            f"antialias={vit.antialias}: its readers use {official[0]}, {official[1]}."
        )
    return opened(out, lambda tensors: VisionTransformer(infer_config(tensors, vit.heads)[0]), notes)


def opened(
    out: Path, build: Callable[[Mapping[str, Tensor]], Backbone], notes: list[str], every_size: bool = False
) -> Exported:
    """A pretrain file that was written, as its readers open it: `build` infers the backbone from tensors."""
    tensors = open_checkpoint(out).tensors
    again = build(tensors).eval()
    again.load_state_dict(tensors, strict=True)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = again([images], [None])[0]
        return tokens.cls, tokens.patches

    command = "dinokit.weights.load_backbone('PATH'), or torch.hub.load(..., weights='PATH')"
    return Exported(command, forward, every_size=every_size, notes=notes)
