"""What a backward pass keeps, by arithmetic: the larger half of the memory that a step takes."""

from dinokit.config import Recipe
from dinokit.train.student_teacher import Network

# Bytes a token and a unit of width that a transformer block keeps in 16-bit, attention weights not stored:
# equation 1 of Korthikanti et al. 2022 (arXiv 2205.05198) without that term.
BLOCK = 34
# The same under run.checkpointing: a block's input in float32, and with `selective` the products in 16-bit.
KEPT = {"none": BLOCK, "selective": 24, "full": 4}


def activations(recipe: Recipe, student: Network, images: int) -> tuple[int, float]:
    """Student tokens of one forward pass over `images`, and GiB that its backward pass needs: an estimate."""
    backbone, tokens = student.backbone, 0
    for group in (recipe.crops.globals, recipe.crops.locals):
        tokens += images * group.count * (1 + (group.size // backbone.patch) ** 2)
    kept, depth = KEPT[recipe.run.checkpointing], len(backbone.blocks)
    again = 0 if kept == BLOCK else BLOCK  # one block at a time is computed once more
    blocks = tokens * backbone.width * (depth * kept + again)
    crops = 2 * recipe.crops.globals.count + recipe.crops.locals.count  # the teacher sees the global ones too
    logits = images * crops * recipe.heads.cls.prototypes * 3 * 4  # logits, exponentials, gradient
    if recipe.masks is not None or recipe.teacher.frozen:
        head = recipe.heads.patch or recipe.heads.cls
        share = recipe.masks.images * sum(recipe.masks.patches) / 2 if recipe.masks is not None else 1.0
        patches = images * recipe.crops.globals.count * (recipe.crops.globals.size // backbone.patch) ** 2
        logits += round(patches * share) * 2 * head.prototypes * 3 * 4
    return tokens, (blocks + logits) / 2**30
