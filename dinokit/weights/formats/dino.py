"""DINO's own files (arXiv 2104.14294): the pretrain file, and the full checkpoint of a run."""

from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats._names import backbone_tensors, is_vit
from dinokit.weights.found import Found, found_vit


def read(file: Checkpoint, heads: int | None) -> Found | None:
    """A ViT with neither LayerScale nor registers nor mask token; timm's copies have the same tensors."""
    tensors, beside = backbone_tensors(file.tensors)
    marks = ("mask_token", "register_tokens", "reg_token", "blocks.0.ls1.gamma")
    if "architecture" in file.config or not is_vit(tensors) or any(mark in tensors for mark in marks):
        return None
    kind = "DINO, full checkpoint" if file.wrapper else "DINO, pretrain file (timm's have the same tensors)"
    return found_vit(kind, tensors, heads, None, [*beside, *file.beside])
