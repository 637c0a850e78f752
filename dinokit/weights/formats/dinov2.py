"""DINOv2's own files (arXiv 2304.07193): pretrain files, with registers or without, and training dumps."""

from pathlib import Path

import torch
from torch import Tensor

from dinokit.models.vit import VisionTransformer
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint
from dinokit.weights.formats._names import backbone_tensors, is_vit
from dinokit.weights.found import HEAD, Found, anatomy, found_vit
from dinokit.weights.written import Written, heads_of, two_sizes


def read(file: Checkpoint, heads: int | None) -> Found | None:
    """A ViT with a mask token."""
    tensors, beside = backbone_tensors(file.tensors)
    if not is_vit(tensors) or not {"mask_token", "register_tokens"} & set(tensors):
        return None
    with_registers = " with registers" if "register_tokens" in tensors else ""
    kind = f"DINOv2{with_registers}, {'training dump' if file.wrapper or beside else 'pretrain file'}"
    return found_vit(kind, tensors, heads, None, [*beside, *file.beside])


def write(vit: VisionTransformer, out: Path, size: int | None = None) -> Written:
    """The pretrain file: a flat dict of tensors, as torch.save writes it.

    Args:
        vit: to write; one of DINO has the names of DINO's own file.
        out: the new file.
        size: not used; only a graph has one.
    """
    torch.save({name: tensor.cpu().clone() for name, tensor in vit.state_dict().items()}, out)
    heads, official = heads_of(vit), (0.0, True) if vit.registers else (0.1, False)
    notes = []
    if vit.width != HEAD * heads:
        notes.append(
            f"The file cannot say that there are {heads} heads: its readers suppose {HEAD} channels a head. "
            f"load_backbone needs heads={heads}."
        )
    if (vit.offset, vit.antialias) != official:
        notes.append(
            f"The file cannot say that positions are resampled with offset={vit.offset}, "
            f"antialias={vit.antialias}: its readers use {official[0]}, {official[1]}."
        )
    tensors = open_checkpoint(out).tensors
    again = VisionTransformer(anatomy(tensors, heads)[0]).eval()  # as its readers take it to be
    again.load_state_dict(tensors, strict=True)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = again([images], [None])[0]
        return tokens.cls, tokens.patches

    return Written(
        lambda path: f"dinokit.weights.load_backbone('{path}'), or torch.hub.load(..., weights='{path}')",
        forward,
        two_sizes(vit),
        notes=notes,
    )
