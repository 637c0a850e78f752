"""One optimiser step: colour, losses, backward, clip, rates, step, teacher."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.batch import Batch
from dinokit.losses import end_of_step
from dinokit.runtime.device import DTYPES
from dinokit.runtime.distributed import rank, world_size
from dinokit.train import state
from dinokit.train.blocks import prepare
from dinokit.train.distill import GUIDE
from dinokit.train.optim import build_optimizer, clip_gradients, drop_prototype_gradients, set_rates
from dinokit.train.parallel import spread, synced
from dinokit.train.schedule import Schedules
from dinokit.train.start import Model, build_model


class Step:
    """One optimiser step and all that it changes: model, optimiser, scaler.

    Args:
        recipe: of the run.
        device: to train on.
        parts: that this process's share of a batch is cut into; 0: run.accumulate.
        model: what to train, if it is made already.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, parts: int = 0, model: Model | None = None
    ) -> None:
        self.recipe, self.device = recipe, device
        self.parts = parts or recipe.run.accumulate
        self.model = (model or build_model(recipe)).to(device).train()
        prepare(self.model, recipe.run, device)
        self.images_at_once = recipe.optim.batch // world_size() // self.parts
        # What is called in a step: the model, or it in DDP.
        self.replica = spread(self.model, recipe, device, self.images_at_once)
        self.colour = Photometric(recipe.crops, compiled=recipe.run.compiles("colour"))
        self.optimizer = build_optimizer(self.model.student, recipe.optim)
        self.schedules = Schedules(recipe)
        self.dtype = DTYPES[recipe.run.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Move student and teacher by a batch. Returns each loss () before its weight, and gradient norms."""
        step, optim = batch.step, self.recipe.optim
        # Stochastic depth draws from the global generator: a function of (seed, step, process) like all else.
        torch.manual_seed(_mix(self.recipe.run.seed, step, rank()))
        self.optimizer.zero_grad()
        values = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        values |= {f"grad_{name}": norm for name, norm in clip_gradients(self.model.student, optim).items()}
        if optim.head_freeze == "gradient" and step < optim.head_frozen:
            drop_prototype_gradients(self.optimizer)
        s = self.schedules
        set_rates(self.optimizer, s.rates(step), s.weight_decay(step))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Also after an overflow, which left the student as it was: to ask for that would wait for the device.
        self.model.update_teacher(s.momentum(step))
        end_of_step(self.model)
        return values

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.parts
        temp = self.schedules.teacher_temp(batch.step)
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(batch.split(parts)):
            if parts > 1 and self.device.type == "cuda":
                part = part.pin_memory()  # parts are new tensors, and the copy of others would be waited for
            seen = self.coloured(part)
            with synced(self.replica, last=i == parts - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    losses = self.replica(seen, temp)
                del seen  # the backward pass reads copies in half precision: the crops need not outlive it
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

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """What a checkpoint holds: tensors by name, and the rest. All processes call it."""
        return state.tensors(self.model, self.model.student, self.optimizer), self.scaler.state_dict()

    def targets(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Tensors to read a checkpoint that has these into; they are for load()."""
        return state.targets(shapes, self.model, self.model.student, self.optimizer)

    def load(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, object]) -> None:
        """Take back what state() gave."""
        state.restore(tensors, self.model, self.model.student, self.optimizer)
        self.scaler.load_state_dict(dict(scaler))


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
