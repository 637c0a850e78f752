"""What a recipe amounts to, computed without running it: parameters, memory, images, learning rate."""

import torch

from dinokit.config import Recipe
from dinokit.data.photometric import Photometric
from dinokit.train.loop import block_masks
from dinokit.train.parallel import STATE_BYTES
from dinokit.train.parts import parts_of_step
from dinokit.train.scale import Cluster, describe
from dinokit.train.student_teacher import Network, StudentTeacher

# Bytes a token, a block and a unit of width that a transformer block keeps for its backward pass in 16-bit,
# attention weights not stored: equation 1 of Korthikanti et al. 2022 (arXiv 2205.05198) without that term.
BYTES_A_TOKEN = 34


def plan(recipe: Recipe, cluster: Cluster | None = None) -> dict[str, str]:
    """Lines for people, by name; with a cluster, more of what the recipe is there.

    Raises:
        ValueError: for all that would stop the run before its first step, but for the data.
    """
    with torch.device("meta"):
        student = StudentTeacher(recipe).student  # a frozen teacher's file is not opened here
    block_masks(recipe, student.backbone)
    Photometric(recipe.crops)
    optim = recipe.optim
    parts = recipe.run.accumulate
    images = optim.batch // parts
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()}
    state = sum(counts.values()) * STATE_BYTES / 2**30
    tokens, activations = _activations(recipe, student, images)
    crops = recipe.crops.globals.count + recipe.crops.locals.count
    frozen = {"teacher": f"{recipe.teacher.frozen}, frozen; its memory comes on top of what follows"}
    lines = (frozen if recipe.teacher.frozen else {}) | {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "memory": f"{state:.2f} GiB for weights, gradients, AdamW and teacher; about {activations:.1f} GiB "
        f"for what a backward pass over {images} images in one process keeps (an estimate, without "
        f"checkpointing)",
        "a step": f"{optim.batch} images, {optim.batch * crops} crops, {tokens * parts:,} student tokens, "
        f"in {parts} part{'s' if parts > 1 else ''} of {images}",
        "the run": f"{optim.steps:,} steps, {optim.steps * optim.batch:,} images",
        "learning rate": f"{optim.peak_lr:.4g} at the peak ({optim.lr:g} at {optim.lr_batch} images, "
        f"rule {optim.lr_rule})",
    }
    if cluster is None:
        return lines
    apart = optim.batch // cluster.world // parts_of_step(recipe, cluster.world)
    return lines | describe(recipe, student, cluster, _activations(recipe, student, apart)[1])


def _activations(recipe: Recipe, student: Network, images: int) -> tuple[int, float]:
    """Student tokens of one forward pass, and GiB that its backward pass needs."""
    backbone, tokens = student.backbone, 0
    for group in (recipe.crops.globals, recipe.crops.locals):
        tokens += images * group.count * (1 + (group.size // backbone.patch) ** 2)
    blocks = tokens * backbone.width * len(backbone.blocks) * BYTES_A_TOKEN
    crops = 2 * recipe.crops.globals.count + recipe.crops.locals.count  # the teacher sees the global ones too
    logits = images * crops * recipe.heads.cls.prototypes * 3 * 4  # logits, exponentials, gradient
    if recipe.masks is not None or recipe.teacher.frozen:
        head = recipe.heads.patch or recipe.heads.cls
        share = recipe.masks.images * sum(recipe.masks.patches) / 2 if recipe.masks is not None else 1.0
        patches = images * recipe.crops.globals.count * (recipe.crops.globals.size // backbone.patch) ** 2
        logits += round(patches * share) * 2 * head.prototypes * 3 * 4
    return tokens, (blocks + logits) / 2**30
