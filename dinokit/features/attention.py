"""Attention of the class token over all tokens in one block, computed from its queries and keys.

Attention kernels do not return their weights. So a hook records the queries and keys of one block during a
normal forward pass, and only the row of the class token is computed from them: O(T * D).

    b  images     H  heads     T  tokens: class, registers, patches     D  width     d  D / H
"""

import torch
from torch import Tensor, nn

from dinokit.features.tokens import frozen
from dinokit.models import Backbone


@torch.inference_mode()
def attention(backbone: Backbone, crops: Tensor, block: int = -1) -> Tensor:
    """Softmax attention of the class token over all tokens, in one block.

    The last N of T are the patches, row by row: attention(...)[..., -N:].unflatten(2, (h, w)) are H maps.
    DINO uses the last block (arXiv 2104.14294, figure 1).

    Args:
        backbone: a ViT of ours or of timm, on the device of the crops; it does not change.
        crops: (b, C, h, w), normalised.
        block: its index, from 0; negative ones count from the end.

    Returns:
        (b, H, T) float32; rows sum to 1.

    Raises:
        ValueError: if there is no such block, or it has another kind of attention.
    """
    depth = len(backbone.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block={block}: the backbone has {depth} blocks, numbered from 0.")
    layer = getattr(backbone.blocks[block], "attn", None)
    heads = getattr(layer, "heads", None) or getattr(layer, "num_heads", None)
    qkv = getattr(layer, "qkv", None)
    if not isinstance(layer, nn.Module) or not isinstance(qkv, nn.Linear) or not heads:
        raise ValueError(
            f"Block {block} of {type(backbone).__name__} has no attention with one linear layer "
            f"`attn.qkv`, so its weights cannot be computed."
        )
    recorded: list[Tensor] = []
    handle = qkv.register_forward_hook(lambda _, __, out: recorded.append(out))
    try:
        with frozen(backbone):
            backbone([crops], [None])
    finally:
        handle.remove()
    return _weights(layer, recorded[0].reshape(len(crops), -1, qkv.out_features), int(heads))


def _weights(layer: nn.Module, qkv: Tensor, heads: int) -> Tensor:
    """(b, T, 3 * D) -> (b, H, T)."""
    q, k, _ = qkv.float().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (b, H, T, d)
    q = getattr(layer, "q_norm", nn.Identity())(q[:, :, :1])
    k = getattr(layer, "k_norm", nn.Identity())(k)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)[:, :, 0]
