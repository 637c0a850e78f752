"""What changes with the step: pure functions of the recipe, so that a resumed run needs no memory of them."""

import math

from dinokit.config.load import Recipe


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end`, which it reaches at `steps` and keeps."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def _line(peak: float, step: int, steps: int) -> float:
    """From 0 at step 0 to `peak` at the last of `steps`; 0 before."""
    return peak * max(step, 0) / max(steps - 1, 1)


class Schedules:
    """The values at a step (from 0), as DINO and DINOv2 compute them (arXiv 2304.07193, table 16)."""

    def __init__(self, recipe: Recipe) -> None:
        self.optim, self.teacher = recipe.optim, recipe.teacher

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of each part of the student."""
        return {
            "backbone": self.lr(step),
            "heads": self.head_lr(step),
            "prototypes": self.prototypes_lr(step),
        }

    def lr(self, step: int) -> float:
        """The backbone's: nothing while the heads warm up; a line from 0 to the peak; a cosine to min_lr."""
        first, warmup = self.optim.head_warmup, self.optim.warmup
        if step < first + warmup:
            return _line(self.optim.peak_lr, step - first, warmup)
        return cosine(
            self.optim.peak_lr, self.optim.min_lr, step - first - warmup, self.optim.steps - first - warmup
        )

    def head_lr(self, step: int) -> float:
        """The heads': with head_warmup, at its peak when the backbone begins to move; else the backbone's."""
        first = self.optim.head_warmup
        if step < first:
            return _line(self.optim.peak_lr, step, first)
        return self.optim.peak_lr if first and step < first + self.optim.warmup else self.lr(step)

    def prototypes_lr(self, step: int) -> float:
        """The heads', and nothing while the prototypes are frozen by it."""
        frozen = self.optim.head_freeze == "lr" and step < self.optim.head_frozen
        return 0.0 if frozen else self.head_lr(step)

    def weight_decay(self, step: int) -> float:
        """A cosine over the whole run."""
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
