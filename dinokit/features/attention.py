"""What the class token looks at: its attention in one block, computed from that block's queries and keys.

Attention kernels never form the weights. So the network runs as ever, one block's queries and keys are caught
on the way, and only the class token's row of weights is computed of them: O(T * D).

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
    The blocks after this one are computed in vain; take the last, as DINO does (arXiv 2104.14294, figure 1).

    Args:
        backbone: a ViT of ours or of timm, on the device of the crops; left as it is.
        crops: (b, C, h, w), normalised.
        block: its number, from 0; from the end if negative.

    Returns:
        (b, H, T) float32; rows sum to 1.

    Raises:
        ValueError: if there is no such block, or its attention is of another kind.
    """
    depth = len(backbone.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block={block}: the backbone has {depth} blocks, numbered from 0.")
    layer = getattr(backbone.blocks[block], "attn", None)
    heads = getattr(layer, "heads", None) or getattr(layer, "num_heads", None)
    qkv = getattr(layer, "qkv", None)
    if not isinstance(layer, nn.Module) or not isinstance(qkv, nn.Linear) or not heads:
        raise ValueError(
            f"Block {block} of {type(backbone).__name__} has no attention that is made by one linear layer "
            f"`attn.qkv`, so its weights cannot be computed here."
        )
    caught: list[Tensor] = []
    handle = qkv.register_forward_hook(lambda _, __, out: caught.append(out))
    try:
        with frozen(backbone):
            backbone([crops], [None])
    finally:
        handle.remove()
    return _weights(layer, caught[0].reshape(len(crops), -1, qkv.out_features), int(heads))


def _weights(layer: nn.Module, qkv: Tensor, heads: int) -> Tensor:
    """(b, T, 3 * D) -> (b, H, T)."""
    q, k, _ = qkv.float().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (b, H, T, d)
    q, k = (
        norm(x)
        for norm, x in ((getattr(layer, "q_norm", _same), q[:, :, :1]), (getattr(layer, "k_norm", _same), k))
    )
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)[:, :, 0]


def _same(x: Tensor) -> Tensor:
    return x
