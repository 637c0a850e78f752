"""What a recipe needs on many GPUs, by arithmetic: memory of each, bytes sent in a step, images a second.

P  parameters of the student      W  processes, one a GPU      s  processes that a tensor is cut over
n  nodes                          g  GPUs of a node
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dinokit.config.load import Recipe
from dinokit.train.parallel import GIB, STATE_BYTES, fits_whole
from dinokit.train.parts import FULL, parts_of_step
from dinokit.train.student_teacher import Network

TOO_MUCH = (
    " DOES NOT FIT: raise run.accumulate, take run.checkpointing=full, more nodes, or run.parallel=fsdp"
)
ITERATIONS = 4  # all-reduces of a Sinkhorn-Knopp: a maximum and three sums


@dataclass
class Cluster:
    """Where a run is planned to run; what was not given is assumed, and said."""

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
        """W."""
        return self.nodes * self.gpus


def kind_and_cut(
    recipe: Recipe, parameters: int, kept: float, c: Cluster
) -> tuple[Literal["none", "ddp", "fsdp"], int]:
    """What run.parallel comes to if the backward pass needs `kept` GiB, and s: as parallel.py does it."""
    wanted = recipe.run.parallel
    if c.world == 1:
        return "none", 1
    if wanted == "none":
        raise ValueError(f"run.parallel=none trains in one process, but nodes={c.nodes} gpus={c.gpus}.")
    fits = fits_whole(parameters, kept, c.gpu_gib)
    kind = wanted if wanted != "auto" else "ddp" if fits else "fsdp"
    if kind == "ddp":
        return kind, 1
    return kind, c.gpus if c.nodes > 1 and c.gpus > 1 else c.world


def held(parameters: Iterable[Tensor], s: int) -> int:
    """Numbers of these that the fullest of s processes holds: each is cut along its first dimension."""
    return sum(math.ceil(p.shape[0] / s) * math.prod(p.shape[1:]) for p in parameters)


def gathered(student: Network, half: bool) -> int:
    """Bytes of the whole student as FSDP gathers it: blocks in 16-bit if `half`, the rest in float32."""
    total = sum(p.numel() for p in student.parameters())
    blocks = sum(p.numel() for p in student.backbone.blocks.parameters())
    return total * 4 - (blocks * 2 if half else 0)


def at_once(student: Network, half: bool) -> int:
    """Bytes that FSDP has gathered at a time: two blocks, and the largest other part with its gradient."""
    size = [sum(p.numel() for p in block.parameters()) for block in student.backbone.blocks]
    heads = [part for name, part in student.named_children() if name != "backbone"]
    head = max(sum(p.numel() for p in part.parameters()) for part in heads)
    return 2 * max(size, default=0) * (2 if half else 4) + head * 8


def sent(recipe: Recipe, student: Network, c: Cluster, parts: int, kept: float = 0.0) -> tuple[float, float]:
    """Bytes in a step that a GPU sends inside its node, and that a node sends to others.

    Collectives are counted as rings: of x bytes over m, an all-gather or reduce-scatter sends (m - 1) / m * x
    from each, an all-reduce twice that.
    """
    total = sum(p.numel() for p in student.parameters())
    kind, s = kind_and_cut(recipe, total, kept, c)
    half = recipe.run.precision in ("auto", "bf16", "fp16")
    prototypes = recipe.heads.cls.prototypes + (recipe.heads.patch or recipe.heads.cls).prototypes
    balance = 2 * parts * ITERATIONS * prototypes * 4
    among, across = (c.gpus - 1) / c.gpus, (c.nodes - 1) / c.nodes
    if kind != "fsdp":
        return among * (2 * total * 4 + balance), across * (2 * total * 4 + balance)
    # The student's weights forward and again backward, the teacher's forward; then gradients in float32.
    moved = parts * (3 * gathered(student, half) + total * 4)
    if s == c.gpus:
        return among * (moved + balance), across * (2 * total * 4 + balance)
    return among * moved, across * c.gpus * moved  # every node has GPUs of one process each: all goes across


def describe(recipe: Recipe, student: nn.Module, c: Cluster, kept: float) -> dict[str, str]:
    """Lines for people, by name.

    Args:
        recipe: to run.
        student: its network, on whatever device.
        c: where.
        kept: GiB that a GPU's backward pass needs for one part.

    Raises:
        ValueError: if the recipe cannot run so.
    """
    assert isinstance(student, Network)
    total = sum(p.numel() for p in student.parameters())
    kind, s = kind_and_cut(recipe, total, kept, c)
    parts = parts_of_step(recipe, c.world)
    half = recipe.run.precision in ("auto", "bf16", "fp16")
    state = held(student.parameters(), s) * STATE_BYTES / GIB
    extra = at_once(student, half) / GIB if kind == "fsdp" else 0.0
    need = state + extra + kept
    own = recipe.optim.batch // c.world
    inside, across = sent(recipe, student, c, parts, kept)
    seconds = inside / (c.gpu_gbyte * 1e9) + across / (c.node_gbit * 1e9 / 8)
    cut = {"fsdp": f"every tensor cut over {s} GPUs", "ddp": "all on every GPU", "none": "one process"}[kind]
    lines = {
        "spread": f"{c.nodes} nodes of {c.gpus} GPUs, {kind}: {cut}; {own} images a GPU in a step, in "
        f"{parts} part{'s' if parts > 1 else ''}",
        "memory of a GPU": f"{state:.2f} GiB for weights, gradients, AdamW and teacher, {extra:.2f} GiB "
        f"gathered at a time, about {kept:.1f} GiB for the backward pass: {need:.1f} of "
        f"{c.gpu_gib:g} GiB{'' if need < FULL * c.gpu_gib else TOO_MUCH}",
        "sent in a step": f"{inside / 1e9:.2f} GB by a GPU inside its node, {across / 1e9:.2f} GB by a node "
        f"to others: {seconds * 1000:.0f} ms at {c.gpu_gbyte:g} GB/s and {c.node_gbit:g} Gbit/s",
    }
    if c.images_per_second:
        work = own / c.images_per_second
        low, high = recipe.optim.batch / (work + seconds), recipe.optim.batch / max(work, seconds)
        days = [recipe.optim.steps * recipe.optim.batch / rate / 86400 for rate in (low, high)]
        lines["speed"] = (
            f"{low:,.0f} to {high:,.0f} images/s, {days[0]:.1f} to {days[1]:.1f} days: if nothing, or "
            f"everything, of what is sent hides behind the computing"
        )
    lines["assumed"] = f"gpu_gib={c.gpu_gib:g} gpu_gbyte={c.gpu_gbyte:g} node_gbit={c.node_gbit:g}; " + (
        f"every GPU does images_per_second={c.images_per_second:g} alone, and its data keep up"
        if c.images_per_second
        else "give images_per_second=N, measured on one GPU, for a speed"
    )
    return lines
