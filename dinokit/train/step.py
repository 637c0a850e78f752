"""One optimiser step: colour, losses, backward, clip, rates, step, teacher."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dinokit.config import Recipe
from dinokit.data.batch import Batch
from dinokit.data.photometric import Photometric
from dinokit.device import DTYPES
from dinokit.distributed import rank
from dinokit.train.distill import GUIDE, Distillation
from dinokit.train.optim import build_optimizer, clip_gradients, drop_prototype_gradients, set_rates
from dinokit.train.schedule import Schedules
from dinokit.train.student_teacher import StudentTeacher


class Step:
    """One optimiser step and all that it changes: model, optimiser, scaler."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        build = Distillation if recipe.teacher.frozen else StudentTeacher
        self.model = build(recipe).to(device).train()
        self.colour = Photometric(recipe.crops)
        self.optimizer = build_optimizer(self.model.student, recipe.optim)
        self.schedules = Schedules(recipe)
        self.dtype = DTYPES[recipe.run.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Move student and teacher by a batch. Returns each loss () before its weight, and gradient norms."""
        step, optim = batch.step, self.recipe.optim
        # Stochastic depth draws from the global generator: a function of (seed, step, process) like all else.
        torch.manual_seed(_mix(self.recipe.run.seed, step, rank()))
        self.optimizer.zero_grad(set_to_none=True)
        values = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        values |= {f"grad_{name}": norm for name, norm in clip_gradients(self.model.student, optim).items()}
        if optim.head_freeze == "gradient" and step < optim.head_frozen:
            drop_prototype_gradients(self.optimizer)
        s = self.schedules
        set_rates(self.optimizer, s.rates(step), s.weight_decay(step))
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the step was skipped for an overflow: nothing is new
            self.model.update_teacher(s.momentum(step))
        return values

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.recipe.run.accumulate
        temp = self.schedules.teacher_temp(batch.step)
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(batch.split(parts)):
            if parts > 1 and self.device.type == "cuda":
                part = part.pin_memory()  # parts are new tensors, and the copy of others would be waited for
            seen = self.coloured(part)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                losses = self.model(seen, temp, new_step=i == 0)
            total = sum(self._weight(name) * value for name, value in losses.items())
            self.scaler.scale(total / parts).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / parts
        return sums

    def _weight(self, name: str) -> float:
        return self.recipe.losses[name.removeprefix(GUIDE)]["weight"]

    def coloured(self, batch: Batch) -> Batch:
        """The batch on the device, its crops coloured and normalised."""
        batch = batch.to(self.device)
        batch.global_crops = self.colour(batch.global_crops, batch.global_colour)
        if len(batch.local_crops):
            batch.local_crops = self.colour(batch.local_crops, batch.local_colour)
        return batch

    def state(self) -> dict[str, object]:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: Mapping[str, dict[str, object]]) -> None:
        """Take back what state() gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
