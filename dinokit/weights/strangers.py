"""Models that are no backbone of DINO's family, known by the names of their tensors: so a refusal can say."""

import re
from collections.abc import Iterable

# What a file is, and a pattern of names that only such files have. The first that is found decides.
FAMILIES = (
    ("a diffusion model", r"^(down|up|mid)_blocks?\.|model\.diffusion_model\.|^transformer_blocks\."),
    ("an object detector", r"^rpn\.|^roi_heads\.|bbox_embed|^bbox_head|^model\.\d+\.(conv|cv\d|m)\."),
    ("a segmentation model", r"^decode_head\.|^mask_embed"),
    (
        "a CLIP-like model of images and text",
        r"visual\.(conv1|class_emb|trans)|vision_model\.|logit_scale|^norm_pre\.",
    ),
    ("a Swin or BEiT, whose positions are relative", r"relative_position_bias_table"),
    ("a masked autoencoder (MAE), or one fine-tuned from it", r"decoder_(blocks|embed|pos)|^fc_norm\."),
    ("a masked autoencoder (MAE)", r"^decoder\.decoder_"),
    ("a DINOv3, whose positions are rotary", r"rope_embeddings|storage_tokens"),
    ("a language model", r"layers\.\d+\.self_attn|^transformer\.h\.\d|^bert\.|lm_head"),
    ("a ViT whose queries and keys are normalised", r"^blocks\.\d+\.attn\.[qk]_norm\."),
    ("a ViT of torchvision, which is trained with labels", r"^encoder\.layers\.encoder_layer_\d"),
    ("a convolutional network", r"layer1\.0|^stem\.|^stages\.|^features\.\d|bn1\.running_mean"),
    ("a ViT trained with labels (it has a classifier)", r"^head\.(weight|bias)$|^classifier\.|dist_token"),
    ("the projection head of a DINO without its backbone", r"head\.(mlp|last_layer)"),
)


def family(names: Iterable[str]) -> str:
    """What a file with tensors of such names is, as 'a ...'; empty if nobody knows."""
    here = list(names)
    known = next((what for what, pattern in FAMILIES if any(re.search(pattern, name) for name in here)), "")
    if known or not any(name.startswith("blocks.0.") for name in here):
        return known
    placed = any("pos_embed" in name for name in here)
    return "" if placed else "a ViT that stores no positions, such as DINOv3, where they are rotary"
