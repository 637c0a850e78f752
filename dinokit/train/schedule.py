"""Schedules and gradient accumulation: pure functions of the recipe, so a resumed run computes them anew."""

import math
from collections.abc import Mapping
from typing import Any

from dinokit.config import registry
from dinokit.config.load import Recipe

FULL = 0.9  # of a GPU's memory: more than this is not planned for


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end`, which it reaches at `steps` and stays at."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def _line(peak: float, step: int, steps: int) -> float:
    """From 0 at step 0 to `peak` at the last of `steps`; 0 before."""
    return peak * max(step, 0) / max(steps - 1, 1)


class Schedules:
    """The values at a step (from 0), as DINO and DINOv2 compute them (arXiv 2304.07193, table 16)."""

    def __init__(self, recipe: Recipe) -> None:
        self.optim, self.teacher, self.losses = recipe.optim, recipe.teacher, recipe.losses

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of backbone, heads and prototypes."""
        return {
            "backbone": self.lr(step),
            "heads": self.head_lr(step),
            "prototypes": self.prototypes_lr(step),
        }

    def lr(self, step: int) -> float:
        """The backbone's: 0 while the heads warm up; a line from 0 to the peak; a cosine to min_lr.

        With optim.schedule=constant the line reaches the peak at the first step after the warm-up, and the
        rate stays there.
        """
        first, warmup, peak = self.optim.head_warmup, self.optim.warmup, self.optim.peak_lr
        if self.optim.schedule == "constant" and step >= first:
            return peak * min((step - first) / warmup, 1.0) if warmup else peak
        if step < first + warmup:
            return _line(peak, step - first, warmup)
        return cosine(peak, self.optim.min_lr, step - first - warmup, self.optim.steps - first - warmup)

    def head_lr(self, step: int) -> float:
        """The heads': with head_warmup, at its peak when the backbone begins to move; else the backbone's."""
        first = self.optim.head_warmup
        if step < first:
            return _line(self.optim.peak_lr, step, first)
        return self.optim.peak_lr if first and step < first + self.optim.warmup else self.lr(step)

    def prototypes_lr(self, step: int) -> float:
        """The heads', and 0 while the prototypes are frozen by their learning rate."""
        frozen = self.optim.head_freeze == "lr" and step < self.optim.head_frozen
        return 0.0 if frozen else self.head_lr(step)

    def active_losses(self, step: int) -> list[str]:
        """The losses that count at a step: from the first to the second share of the run in their `phase`."""
        phases = {name: values.get("phase", (0.0, 1.0)) for name, values in self.losses.items()}
        at = step / self.optim.steps
        return [name for name, (start, end) in phases.items() if start <= at < end]

    def loss_weight(self, name: str, step: int) -> float:
        """The weight of a loss: half a cosine from 0 over the first `ramp` steps of its phase."""
        values = self.losses[name]
        first = round(values.get("phase", (0.0, 1.0))[0] * self.optim.steps)
        ramp = values.get("ramp", 0)
        return cosine(0.0, float(values["weight"]), max(step - first, 0), ramp)

    def weight_decay(self, step: int) -> float:
        """A cosine over the whole run; constant if both its ends are equal."""
        return cosine(*self.optim.weight_decay, step, self.optim.steps)

    def momentum(self, step: int) -> float:
        """A cosine over the whole run."""
        return cosine(*self.teacher.momentum, step, self.optim.steps)

    def teacher_temp(self, step: int) -> float:
        """A straight line in stairs of temp_every steps, both ends included; then flat."""
        (start, end), every = self.teacher.temp, self.teacher.temp_every
        stairs, stair = self.teacher.temp_warmup // every, step // every
        if stair >= stairs:
            return end
        return start + (end - start) * stair / max(stairs - 1, 1)


def accumulation(recipe: Recipe, world: int, previous: Mapping[str, Any] | None = None) -> int:
    """Micro-batches of a step: `run.accumulate`, or the next number above it that suits this many processes.

    Args:
        recipe: its optim.batch is images over all processes.
        world: processes.
        previous: of the checkpoint that the run resumes from, `images_at_once` and the `memory_share` that it
            took of a GPU. With fewer processes each has more images; if these would not fit, they are split
            into more micro-batches.

    Raises:
        ValueError: if the batch cannot be divided, or too few images are left in a micro-batch for some loss.
    """
    batch, accumulate = recipe.optim.batch, recipe.run.accumulate
    if batch % world:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        fewer, more = max(n for n in divisors if n <= world), -(-batch // world) * world
        raise ValueError(
            f"optim.batch={batch} images cannot be divided evenly over {world} processes. Start {fewer}, "
            f"or for another run set optim.batch={more}."
        )
    images = batch // world
    most = float(images)
    if previous and previous.get("memory_share"):
        most = previous["images_at_once"] * max(FULL / previous["memory_share"], 1.0)
    name, least = least_images(recipe)
    possible = [n for n in range(1, images + 1) if images % n == 0 and images // n >= least]
    if not possible:
        shares = hasattr(registry.read_config("losses", name), "distributed")
        raise ValueError(
            f"losses.{name} compares {least} images of one process, but optim.batch={batch} over {world} "
            f"processes gives each {images}. Start fewer processes, or drop the loss with losses.{name}=null."
            + (f" Or let it compare those of all: losses.{name}.distributed=true." if shares else "")
        )
    return next((n for n in possible if n >= accumulate and images // n <= most), possible[-1])


def least_images(recipe: Recipe) -> tuple[str, int]:
    """The loss that needs most images of a process at a time, and how many."""
    least = {
        name: 1
        if section.get("distributed")
        else getattr(registry.read_config("losses", name), "least_images", 1)
        for name, section in recipe.losses.items()
    }
    name = max(least, key=lambda key: least[key])
    return name, least[name]
