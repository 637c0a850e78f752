"""What a recipe amounts to, computed without running it: parameters, memory, images, learning rate."""

import torch

from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.train.activations import activations
from dinokit.train.loop import block_masks
from dinokit.train.parallel import STATE_BYTES
from dinokit.train.parts import parts_of_step
from dinokit.train.scale import Cluster, describe
from dinokit.train.student_teacher import StudentTeacher


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
    tokens, kept = activations(recipe, images)
    crops = recipe.crops.globals.count + recipe.crops.locals.count
    frozen = {"teacher": f"{recipe.teacher.frozen}, frozen; its memory comes on top of what follows"}
    lines = (frozen if recipe.teacher.frozen else {}) | {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "memory": f"{state:.2f} GiB for weights, gradients, AdamW and teacher; about {kept:.1f} GiB for "
        f"what a backward pass over {images} images in one process keeps (an estimate; "
        f"run.checkpointing={recipe.run.checkpointing})",
        "a step": f"{optim.batch} images, {optim.batch * crops} crops, {tokens * parts:,} student tokens, "
        f"in {parts} part{'s' if parts > 1 else ''} of {images}",
        "the run": f"{optim.steps:,} steps, {optim.steps * optim.batch:,} images",
        "learning rate": f"{optim.peak_lr:.4g} at the peak ({optim.lr:g} at {optim.lr_batch} images, "
        f"rule {optim.lr_rule})",
    }
    if cluster is None:
        return lines
    apart = optim.batch // cluster.world // parts_of_step(recipe, cluster.world)
    return lines | describe(recipe, student, cluster, activations(recipe, apart)[1])
