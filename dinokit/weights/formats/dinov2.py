"""DINOv2's own files (arXiv 2304.07193): pretrain files, with registers or without, and training dumps."""

from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.formats._names import backbone_tensors, is_vit
from dinokit.weights.found import Found, found_vit


def read(file: Checkpoint, heads: int | None) -> Found | None:
    """A ViT with a mask token."""
    tensors, beside = backbone_tensors(file.tensors)
    if not is_vit(tensors) or not {"mask_token", "register_tokens"} & set(tensors):
        return None
    with_registers = " with registers" if "register_tokens" in tensors else ""
    kind = f"DINOv2{with_registers}, {'training dump' if file.wrapper or beside else 'pretrain file'}"
    return found_vit(kind, tensors, heads, None, [*beside, *file.beside])
