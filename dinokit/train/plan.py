"""Plans a recipe by arithmetic, without running it: its size, its memory, and what a cluster would need.

`dinokit show` prints the plan; `run.parallel=auto` chooses by the same estimate of memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dinokit.config.load import Crops, Recipe
from dinokit.data.augment import Photometric
from dinokit.losses import build_losses
from dinokit.losses.chunked import GPU_CHUNK
from dinokit.models import Backbone, Tokens
from dinokit.train.networks import (
    Network,
    block_masks,
    build_backbone,
    compares_all_patches,
    prototypes_of,
)
from dinokit.train.schedule import FULL, accumulation

GIB = 2**30
STATE_BYTES = 5 * 4  # a parameter: student, gradient, two moments, teacher, in float32
# Bytes a token and a unit of width that a transformer block keeps in 16-bit, attention weights not stored:
# equation 1 of Korthikanti et al. 2022 (arXiv 2205.05198) without that term.
BLOCK = 34
# The same under run.checkpointing: a block's input in float32, and with `selective` the products in 16-bit.
BLOCK_BYTES = {"none": BLOCK, "selective": 24, "full": 4}
COLLECTIVES = 4  # all-reduces of a Sinkhorn-Knopp: a maximum and three sums
TOO_MUCH = (
    " DOES NOT FIT: raise run.accumulate, take run.checkpointing=full, more nodes, or run.parallel=fsdp"
)


@dataclass
class Cluster:
    """Where a run is planned to run. What is not given has the usual value of a cluster of A100s."""

    nodes: int = 1
    gpus: int = 1  # of a node
    images_per_second: float = 0.0  # measured on one such GPU, at as many images at a time; 0: not known
    gpu_gib: float = 80.0  # memory of a GPU
    gpu_gbyte: float = 300.0  # GB/s between GPUs of a node, each way
    node_gbit: float = 400.0  # Gbit/s between nodes, of a whole node

    def __post_init__(self) -> None:
        for key, least in {"nodes": 1, "gpus": 1, "images_per_second": 0}.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}, but it must be {least} or more.")
        for key in ("gpu_gib", "gpu_gbyte", "node_gbit"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)}, but it must be above 0.")

    @property
    def world(self) -> int:
        """Processes, one for each GPU."""
        return self.nodes * self.gpus


def plan(recipe: Recipe, cluster: Cluster | None = None) -> dict[str, str]:
    """Lines for people, by name; with a cluster, also what the recipe needs there.

    Raises:
        ValueError: for every mistake that would stop the run before its first step, except in the data.
    """
    with torch.device("meta"):
        student = Network(recipe)
        build_losses(recipe.losses, prototypes_of(recipe))
    block_masks(recipe, student.backbone)
    Photometric(recipe.crops)
    optim, accumulate = recipe.optim, recipe.run.accumulate
    images = optim.batch // accumulate
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in student.named_children()}
    state = state_memory(recipe)
    tokens, activations = activation_memory(recipe, images)
    crops = recipe.crops.globals.count + recipe.crops.locals.count
    frozen = {"teacher": f"{recipe.teacher.frozen}, frozen; its memory comes on top of what follows"}
    lines = (frozen if recipe.teacher.frozen else {}) | {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "memory": f"{state:.2f} GiB for weights, gradients, AdamW and teacher; about {activations:.1f} GiB "
        f"for what a backward pass over {images} images in one process keeps (an estimate; "
        f"run.checkpointing={recipe.run.checkpointing})",
        "a step": f"{optim.batch} images, {optim.batch * crops} crops, {tokens * accumulate:,} student "
        f"tokens, in {_micro_batches(accumulate)} of {images}",
        "the run": f"{optim.steps:,} steps, {optim.steps * optim.batch:,} images",
        "learning rate": f"{optim.peak_lr:.4g} at the peak ({optim.lr:g} at {optim.lr_batch} images, "
        f"rule {optim.lr_rule})",
    }
    if cluster is None:
        return lines
    at_once = optim.batch // cluster.world // accumulation(recipe, cluster.world)
    return lines | cluster_estimate(recipe, student, cluster, activation_memory(recipe, at_once)[1])


def state_memory(recipe: Recipe) -> float:
    """GiB for weights, gradients, AdamW and teacher in one process that keeps all of them."""
    with torch.device("meta"):
        student = Network(recipe)
    total = sum(p.numel() for p in student.parameters()) * STATE_BYTES
    if recipe.teacher.gram is not None and recipe.teacher.gram.weights:  # a frozen backbone more
        total += sum(p.numel() for p in student.backbone.parameters()) * 4
    return total / GIB


def activation_memory(recipe: Recipe, images: int) -> tuple[int, float]:
    """Student tokens of one forward pass over `images`, and GiB that its backward pass needs: an estimate."""
    with torch.device("meta"):
        backbone = build_backbone(recipe)

    def tokens_of(crops: Crops) -> int:
        groups = [group for group in (crops.globals, crops.locals) if group.count]
        return sum(images * group.count * tokens_per_crop(backbone, group.size) for group in groups)

    crops = max(recipe.crops.variants, key=tokens_of)
    tokens, recipe = tokens_of(crops), replace(recipe, crops=crops)
    each, depth = BLOCK_BYTES[recipe.run.checkpointing], len(backbone.blocks)
    recomputed = 0 if each == BLOCK else BLOCK  # one block at a time is computed again
    blocks = tokens * backbone.width * (depth * each + recomputed)
    return tokens, (blocks + _logit_bytes(recipe, backbone, images)) / GIB


def tokens_per_crop(backbone: Backbone, size: int) -> int:
    """Tokens of a crop of `size` pixels a side, registers too, from a backbone on the meta device.

    Raises:
        ValueError: if it does not give Tokens of the shapes that its width and patch say.
    """
    crop = torch.empty(1, backbone.channels, size, size, device="meta")
    with torch.no_grad():
        tokens = backbone.eval()([crop], [None])[0]
    if not isinstance(tokens, Tokens):
        raise ValueError(
            f"{type(backbone).__name__}.forward() gives a {type(tokens).__name__} for a group of crops: it "
            f"must give dinokit.models.Tokens."
        )
    wanted = {"cls": (1, backbone.width), "patches": (1, (size // backbone.patch) ** 2, backbone.width)}
    for name, shape in wanted.items():
        if (given := tuple(getattr(tokens, name).shape)) != shape:
            raise ValueError(
                f"{type(backbone).__name__}.forward() gives {name} of the shape {given} for a crop of {size} "
                f"pixels, and width={backbone.width} and patch={backbone.patch} say {shape}."
            )
    return 1 + tokens.registers.shape[1] + tokens.patches.shape[1]


def _logit_bytes(recipe: Recipe, backbone: Backbone, images: int) -> int:
    """Bytes of logits: the teacher's stay, in float32, and the student's too if `run.logits` is whole.

    Besides, one loss at a time needs its student's logits, or those of a chunk, in 32 and in 16 bits.
    """
    views, whole = recipe.crops.globals.count, recipe.run.logits == "whole"
    heads = [(recipe.heads.cls, images * views, images * (views + recipe.crops.locals.count))]
    if recipe.masks is not None or recipe.teacher.frozen:
        masks = None if compares_all_patches(recipe) else recipe.masks
        share = masks.images * sum(masks.patches) / 2 if masks is not None else 1.0
        patches = round(images * views * (recipe.crops.globals.size // backbone.patch) ** 2 * share)
        heads.append((recipe.heads.patch or recipe.heads.cls, patches, patches))
    stay = sum((teacher + whole * student) * head.prototypes for head, teacher, student in heads)
    most = max(student * head.prototypes for head, _, student in heads)
    return round(4 * (stay + 1.5 * (most if whole else min(most, GPU_CHUNK))))


def fits_unsharded(parameters: int, activations: float, memory: float) -> bool:
    """Whether a GPU has room for a whole run: run.parallel=auto is DDP then.

    Args:
        parameters: of the student.
        activations: GiB that the backward pass needs.
        memory: of the GPU, GiB.
    """
    return parameters * STATE_BYTES / GIB + activations < FULL * memory


def parallel_mode(
    recipe: Recipe, parameters: int, activations: float, c: Cluster
) -> tuple[Literal["none", "ddp", "fsdp"], int]:
    """The mode if the backward pass needs `activations` GiB, and over how many processes it shards."""
    mode, world = recipe.run.parallel, c.world
    if world == 1:
        return "none", 1
    if mode == "none":
        raise ValueError(f"run.parallel=none trains in one process, but nodes={c.nodes} gpus={c.gpus}.")
    if mode == "auto":
        mode = "ddp" if fits_unsharded(parameters, activations, c.gpu_gib) else "fsdp"
    if mode == "ddp":
        return mode, 1
    return mode, c.gpus if c.nodes > 1 and c.gpus > 1 else world


def sharded_numel(parameters: Iterable[Tensor], shards: int) -> int:
    """The most numbers that one of `shards` processes has: a tensor is sharded along its first dimension."""
    return sum(math.ceil(p.shape[0] / shards) * math.prod(p.shape[1:]) for p in parameters)


def gathered_bytes(student: Network, half: bool) -> int:
    """Bytes of the whole student as FSDP gathers it: blocks in 16-bit if `half`, the rest in float32."""
    total = sum(p.numel() for p in student.parameters())
    blocks = sum(p.numel() for p in student.backbone.blocks.parameters())
    return total * 4 - (blocks * 2 if half else 0)


def gathered_at_once(student: Network, half: bool) -> int:
    """Bytes that FSDP has gathered at a time: two blocks, and the largest head with its gradient."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in student.backbone.blocks]
    heads = [child for name, child in student.named_children() if name != "backbone"]
    head = max(sum(p.numel() for p in head.parameters()) for head in heads)
    return 2 * max(blocks, default=0) * (2 if half else 4) + head * 8


def bytes_sent(
    recipe: Recipe, student: Network, c: Cluster, micro_batches: int, activations: float = 0.0
) -> tuple[float, float]:
    """Bytes in a step that a GPU sends inside its node, and that a node sends to others.

    Collectives are counted as rings: of x bytes over m, an all-gather or reduce-scatter sends (m - 1) / m * x
    from each, an all-reduce twice that.
    """
    total = sum(p.numel() for p in student.parameters())
    mode, shards = parallel_mode(recipe, total, activations, c)
    half = recipe.run.precision in ("auto", "bf16", "fp16")
    prototypes = recipe.heads.cls.prototypes + (recipe.heads.patch or recipe.heads.cls).prototypes
    sinkhorn = 2 * micro_batches * COLLECTIVES * prototypes * 4
    inside, across = (c.gpus - 1) / c.gpus, (c.nodes - 1) / c.nodes
    if mode != "fsdp":
        return inside * (2 * total * 4 + sinkhorn), across * (2 * total * 4 + sinkhorn)
    # The student's weights forward and again backward, the teacher's forward; then gradients in float32.
    weights = micro_batches * (3 * gathered_bytes(student, half) + total * 4)
    if shards == c.gpus:
        return inside * (weights + sinkhorn), across * (2 * total * 4 + sinkhorn)
    return inside * weights, across * c.gpus * weights  # nodes of one GPU each: all is sent between nodes


def cluster_estimate(recipe: Recipe, student: Network, c: Cluster, activations: float) -> dict[str, str]:
    """Lines for people, by name.

    Args:
        recipe: to run.
        student: its network, on any device.
        c: where.
        activations: GiB that a GPU's backward pass needs for one micro-batch.

    Raises:
        ValueError: if the recipe cannot run so.
    """
    total = sum(p.numel() for p in student.parameters())
    mode, shards = parallel_mode(recipe, total, activations, c)
    micro_batches = accumulation(recipe, c.world)
    half = recipe.run.precision in ("auto", "bf16", "fp16")
    state = sharded_numel(student.parameters(), shards) * STATE_BYTES / GIB
    extra = gathered_at_once(student, half) / GIB if mode == "fsdp" else 0.0
    need = state + extra + activations
    images = recipe.optim.batch // c.world
    inside, across = bytes_sent(recipe, student, c, micro_batches, activations)
    seconds = inside / (c.gpu_gbyte * 1e9) + across / (c.node_gbit * 1e9 / 8)
    layout = {
        "fsdp": f"every tensor sharded over {shards} GPUs",
        "ddp": "all on every GPU",
        "none": "one process",
    }
    lines = {
        "parallel": f"{c.nodes} nodes of {c.gpus} GPUs, {mode}: {layout[mode]}; {images} images a GPU in a "
        f"step, in {_micro_batches(micro_batches)}",
        "memory of a GPU": f"{state:.2f} GiB for weights, gradients, AdamW and teacher, {extra:.2f} GiB "
        f"gathered at a time, about {activations:.1f} GiB for the backward pass: {need:.1f} of "
        f"{c.gpu_gib:g} GiB{'' if need < FULL * c.gpu_gib else TOO_MUCH}",
        "sent in a step": f"{inside / 1e9:.2f} GB by a GPU inside its node, {across / 1e9:.2f} GB by a node "
        f"to others: {seconds * 1000:.0f} ms at {c.gpu_gbyte:g} GB/s and {c.node_gbit:g} Gbit/s",
    }
    if c.images_per_second:
        computing = images / c.images_per_second
        slow, fast = recipe.optim.batch / (computing + seconds), recipe.optim.batch / max(computing, seconds)
        days = [recipe.optim.steps * recipe.optim.batch / rate / 86400 for rate in (slow, fast)]
        lines["speed"] = (
            f"{slow:,.0f} to {fast:,.0f} images/s, {days[0]:.1f} to {days[1]:.1f} days: if nothing, or "
            f"everything, of what is sent overlaps with the computation"
        )
    lines["assumed"] = f"gpu_gib={c.gpu_gib:g} gpu_gbyte={c.gpu_gbyte:g} node_gbit={c.node_gbit:g}; " + (
        f"every GPU alone reaches images_per_second={c.images_per_second:g}, and its data loader keeps up"
        if c.images_per_second
        else "give images_per_second=N, measured on one GPU, for a speed"
    )
    return lines


def _micro_batches(count: int) -> str:
    return f"{count} micro-batch{'es' if count > 1 else ''}"
