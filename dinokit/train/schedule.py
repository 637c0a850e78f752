"""What changes with the step: pure functions of the recipe, so that a resumed run needs no memory of them."""

import math

from dinokit.config import Recipe


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end`, which it reaches at `steps` and keeps."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


class Schedules:
    """The values at a step (from 0), as DINO and DINOv2 compute them (arXiv 2304.07193, table 16)."""

    def __init__(self, recipe: Recipe) -> None:
        self.optim, self.teacher = recipe.optim, recipe.teacher

    def lr(self, step: int) -> float:
        """A straight line from 0 to the peak, reached on the warm-up's last step; then a cosine to min_lr."""
        peak, warmup = self.optim.peak_lr, self.optim.warmup
        if step < warmup:
            return peak * step / max(warmup - 1, 1)
        return cosine(peak, self.optim.min_lr, step - warmup, self.optim.steps - warmup)

    def head_lr(self, step: int) -> float:
        """The prototypes' learning rate: nothing while they are frozen by it."""
        frozen = self.optim.head_freeze == "lr" and step < self.optim.head_frozen
        return 0.0 if frozen else self.lr(step)

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
