"""What a backward pass keeps, by arithmetic: the larger half of the memory that a step takes."""

import torch

from dinokit.config.load import Recipe
from dinokit.losses.chunked import GPU_CHUNK
from dinokit.models import Backbone
from dinokit.train.student_teacher import build_backbone

# Bytes a token and a unit of width that a transformer block keeps in 16-bit, attention weights not stored:
# equation 1 of Korthikanti et al. 2022 (arXiv 2205.05198) without that term.
BLOCK = 34
# The same under run.checkpointing: a block's input in float32, and with `selective` the products in 16-bit.
KEPT = {"none": BLOCK, "selective": 24, "full": 4}


def activations(recipe: Recipe, images: int) -> tuple[int, float]:
    """Student tokens of one forward pass over `images`, and GiB that its backward pass needs: an estimate."""
    with torch.device("meta"):
        backbone = build_backbone(recipe)
    groups = [group for group in (recipe.crops.globals, recipe.crops.locals) if group.count]
    tokens = sum(images * group.count * tokens_of(backbone, group.size) for group in groups)
    kept, depth = KEPT[recipe.run.checkpointing], len(backbone.blocks)
    again = 0 if kept == BLOCK else BLOCK  # one block at a time is computed once more
    blocks = tokens * backbone.width * (depth * kept + again)
    return tokens, (blocks + _logits(recipe, backbone, images)) / 2**30


def tokens_of(backbone: Backbone, size: int) -> int:
    """Tokens of a crop of `size` pixels a side, registers too: asked of a backbone on the meta device."""
    crop = torch.empty(1, backbone.channels, size, size, device="meta")
    with torch.no_grad():
        seen = backbone.eval()([crop], [None])[0]
    return 1 + seen.registers.shape[1] + seen.patches.shape[1]


def _logits(recipe: Recipe, backbone: Backbone, images: int) -> int:
    """Bytes: the teacher's logits stay, in float32, and the student's too if `run.logits` is whole.

    One loss at a time needs its student's logits, or those of a chunk, in 32 and in 16 bits besides.
    """
    views, whole = recipe.crops.globals.count, recipe.run.logits == "whole"
    heads = [(recipe.heads.cls, images * views, images * (views + recipe.crops.locals.count))]
    if recipe.masks is not None or recipe.teacher.frozen:
        share = recipe.masks.images * sum(recipe.masks.patches) / 2 if recipe.masks is not None else 1.0
        patches = round(images * views * (recipe.crops.globals.size // backbone.patch) ** 2 * share)
        heads.append((recipe.heads.patch or recipe.heads.cls, patches, patches))
    stay = sum((taught + whole * asked) * head.prototypes for head, taught, asked in heads)
    most = max(asked * head.prototypes for head, _, asked in heads)
    return round(4 * (stay + 1.5 * (most if whole else min(most, GPU_CHUNK))))
