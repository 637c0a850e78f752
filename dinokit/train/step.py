"""One optimiser step: augment, losses, backward, clip, AdamW, EMA."""

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
from dinokit.train.checkpoint import named_tensors, read_targets, restore
from dinokit.train.optim import build_optimizer, clip_gradients, drop_prototype_gradients, set_rates
from dinokit.train.parallel import gradient_sync, parallelize, prepare_blocks
from dinokit.train.schedule import Schedules
from dinokit.train.student_teacher import GUIDE, StudentTeacher


class Step:
    """One optimiser step, and all that it changes: model, optimiser, gradient scaler.

    Args:
        recipe: of the run.
        device: to train on.
        accumulation: micro-batches that this process's share of a batch is split into; 0: run.accumulate.
        model: to train; None builds it.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        accumulation: int = 0,
        model: StudentTeacher | None = None,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.accumulation = accumulation or recipe.run.accumulate
        self.images_at_once = recipe.optim.batch // world_size() // self.accumulation
        self.model = (model or StudentTeacher(recipe)).to(device).train()
        prepare_blocks(self.model, recipe.run, device)
        self.replica = parallelize(self.model, recipe, device, self.images_at_once)  # the model, or DDP
        self.photometric = Photometric(recipe.crops, compiled=recipe.run.compiles("colour"))
        self.optimizer = build_optimizer(self.model.student, recipe.optim)
        self.schedules = Schedules(recipe)
        self.dtype = DTYPES[recipe.run.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Train on a batch. Returns losses () before their weights, health signals, gradient norms."""
        step, optim, schedules = batch.step, self.recipe.optim, self.schedules
        # Stochastic depth draws from the global generator: a function of (seed, step, process).
        torch.manual_seed(_mix(self.recipe.run.seed, step, rank()))

        self.optimizer.zero_grad()
        losses, signals = self.backward(batch)
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.model.student, optim)
        if optim.head_freeze == "gradient" and step < optim.head_frozen:
            drop_prototype_gradients(self.optimizer)
        set_rates(self.optimizer, schedules.rates(step), schedules.weight_decay(step))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Also after an overflow, when the student did not move: to ask for that would wait for the device.
        self.model.update_teacher(schedules.momentum(step))
        end_of_step(self.model.losses)  # statistics, such as centres
        end_of_step(self.model.guide_losses)
        return {**losses, **signals, **{f"grad_{name}": norm for name, norm in norms.items()}}

    def backward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the weighted sum of the losses, by micro-batches. Returns losses and signals."""
        n = self.accumulation
        temp, active = self.schedules.teacher_temp(batch.step), self.schedules.active_losses(batch.step)
        means: dict[str, Tensor] = {}
        signals: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(batch.split(n)):
            if n > 1 and self.device.type == "cuda":
                micro_batch = micro_batch.pin_memory()  # its tensors are new; copying others would wait
            inputs = self.augment(micro_batch)
            with gradient_sync(self.replica, last=i == n - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    losses = self.replica(inputs, temp, active)
                del inputs  # the backward pass reads copies in half precision
                total = sum(self._weight(name) * value for name, value in losses.items())
                self.scaler.scale(total / n).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / n
            for name, value in self.model.signals.items():
                signals[name] = signals.get(name, 0) + value / n
        return means, signals

    def augment(self, batch: Batch) -> Batch:
        """The batch on the device, with the photometric augmentations, normalised."""
        batch = batch.to(self.device)
        batch.global_crops = self.photometric(batch.global_crops, batch.global_colour)
        if len(batch.local_crops):
            batch.local_crops = self.photometric(batch.local_crops, batch.local_colour)
        return batch

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """For a checkpoint: tensors by name, and the scaler's state. All processes call it."""
        return named_tensors(self.model, self.model.student, self.optimizer), self.scaler.state_dict()

    def read_targets(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Tensors to read a checkpoint with these names and shapes into; then give them to load()."""
        return read_targets(shapes, self.model, self.model.student)

    def load(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, object]) -> None:
        """Restore what state() returned."""
        restore(tensors, self.model, self.model.student, self.optimizer)
        self.scaler.load_state_dict(dict(scaler))

    def _weight(self, name: str) -> float:
        return float(self.recipe.losses[name.removeprefix(GUIDE)]["weight"])


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
