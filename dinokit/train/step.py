"""One optimiser step: augment, losses, backward, clip, AdamW, EMA.

A step whose loss or gradients are not finite changes neither the student, nor the optimiser, nor the
statistics of losses. The device decides that by a flag, so nothing waits for it.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.batch import Batch
from dinokit.data.loader import training_loader
from dinokit.data.sources import ImageSource
from dinokit.losses import end_of_step
from dinokit.runtime.device import DTYPES
from dinokit.runtime.distributed import group, rank, world_size
from dinokit.train import checkpoint
from dinokit.train.checkpoint import SavedCheckpoint
from dinokit.train.networks import block_masks
from dinokit.train.optim import build_optimizer, clip_gradients, drop_prototype_gradients, set_rates
from dinokit.train.parallel import gradient_sync, parallelize, prepare_blocks
from dinokit.train.schedule import Schedules, accumulation
from dinokit.train.student_teacher import GUIDE, StudentTeacher
from dinokit.train.students import SharedTeacher

SKIPPED = "skipped"  # the name of the flag among the values of a step


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
        self.shared_teacher = SharedTeacher(self) if group() is not None else None  # of several students

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Train on a batch.

        Returns:
            Losses () before their weights, health signals, gradient norms, and SKIPPED: 1 if the step was
            skipped, in all processes at once, else 0.
        """
        step, optim, schedules = batch.step, self.recipe.optim, self.schedules
        # Stochastic depth draws from the global generator: a function of (seed, step, process).
        torch.manual_seed(_mix(self.recipe.run.seed, step, rank()))

        self.optimizer.zero_grad()
        statistics = [x.clone() for x in self._statistics()]
        losses, signals = self.backward(batch)
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.model.student, optim)
        skipped = 1 - torch.stack([*norms.values()]).isfinite().all().float()
        if optim.head_freeze == "gradient" and step < optim.head_frozen:
            drop_prototype_gradients(self.optimizer)
        set_rates(self.optimizer, schedules.rates(step), schedules.weight_decay(step))
        # If this is 1, the fused AdamW changes nothing. In fp16 the scaler sets it, by the same rule.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Also after a skipped step: the teacher then moves towards the unchanged student.
        self.model.update_teacher(schedules.momentum(step))
        self.model.refresh_gram_teacher(step + 1)
        end_of_step(self.model.losses)  # statistics, such as centres
        end_of_step(self.model.guide_losses)
        for x, before in zip(self._statistics(), statistics, strict=True):
            x.copy_(torch.where(skipped > 0, before, x))  # a skipped step leaves them as they were
        return {**losses, **signals, **{f"grad_{name}": n for name, n in norms.items()}, SKIPPED: skipped}

    def backward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the weighted sum of the losses, by micro-batches. Returns losses and signals."""
        n = self.accumulation
        temp, active = self.schedules.teacher_temp(batch.step), self.schedules.active_losses(batch.step)
        means: dict[str, Tensor] = {}
        signals: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(batch.split(n)):
            if n > 1 and self.device.type == "cuda" and not micro_batch.global_crops.is_cuda:
                micro_batch = micro_batch.pin_memory()  # split() made new ones; copying these would wait
            inputs = self.augment(micro_batch)
            with gradient_sync(self.replica, last=i == n - 1):
                with self.autocast():
                    losses = self.replica(inputs, temp, active)
                del inputs  # the backward pass reads copies in half precision
                total = sum(self._weight(name, batch.step) * value for name, value in losses.items())
                total = self.scaler.scale(total / n)
                # The factor is 1, but NaN for a loss that is not finite: all gradients of all processes
                # are then NaN.
                total.backward(1 + 0 * total.detach())
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / n
            for name, value in self.model.signals.items():
                signals[name] = signals.get(name, 0) + value / n
        return means, signals

    def autocast(self) -> torch.autocast:
        """In this context, products are computed in run.precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def augment(self, batch: Batch) -> Batch:
        """The batch on the device, with the photometric augmentations, normalised."""
        batch = batch.to(self.device)
        batch.global_crops = self.photometric(batch.global_crops, batch.global_colour)
        if len(batch.local_crops):
            batch.local_crops = self.photometric(batch.local_crops, batch.local_colour)
        if batch.gram_crops is not None:
            batch.gram_crops = self.photometric.normalise(batch.gram_crops)
        return batch

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """For a checkpoint: tensors by name, and the scaler's state. All processes call it."""
        return checkpoint.named_tensors(
            self.model, self.model.student, self.optimizer
        ), self.scaler.state_dict()

    def restore(self, saved: SavedCheckpoint) -> None:
        """Restore what state() returned, from a checkpoint.

        Raises:
            ValueError: if it is damaged, or of another model.
        """
        checkpoint.verify(saved)
        tensors = checkpoint.read_targets(checkpoint.shapes(saved), self.model, self.model.student)
        checkpoint.load(saved, tensors)
        checkpoint.restore(tensors, self.model, self.model.student, self.optimizer)
        self.scaler.load_state_dict(dict(saved.values["scaler"]))

    def loader(self, source: ImageSource, start: int, stop: int) -> Iterable[Batch]:
        """This process's batches of the steps from `start` to `stop` - 1. Raises as training_loader().

        Of several students they are slices, which `shared_teacher` turns into batches.
        """
        return training_loader(
            source, self.recipe.crops, block_masks(self.recipe, self.model.student.backbone),
            seed=self.recipe.run.seed, start_step=start, steps=stop, batch=self.recipe.optim.batch,
            rank=rank(), world=world_size(), accumulation=self.accumulation,
            workers=self.recipe.run.workers, pin=self.device.type == "cuda",
            places=self.shared_teacher.places if self.shared_teacher else (),
        )  # fmt: skip

    def _statistics(self) -> list[Tensor]:
        """What a forward pass changes without gradients: centres of losses, running means of norms."""
        changing = ("losses.", "guide_losses.")
        return [
            x for name, x in self.model.named_buffers() if name.startswith(changing) or ".running_" in name
        ]

    def _weight(self, name: str, step: int) -> float:
        return self.schedules.loss_weight(name.removeprefix(GUIDE), step)


def build_step(recipe: Recipe, device: torch.device, saved: SavedCheckpoint | None) -> tuple[Recipe, Step]:
    """The step of a run, with the weights that it begins with; with a checkpoint, to restore() that.

    Returns:
        The recipe, with the fingerprint of `backbone.weights`; and the step.

    Raises:
        LookupError, ValueError: as accumulation(), StudentTeacher and init_weights().
    """
    micro_batches = accumulation(recipe, world_size(), saved.values if saved else None)
    torch.manual_seed(recipe.run.seed)
    model = StudentTeacher(recipe)
    if recipe.backbone.get("weights") or recipe.teacher.start or recipe.teacher.gram:
        from dinokit.train.pretrained import init_weights

        recipe = init_weights(recipe, model, resumes=saved is not None)
    return recipe, Step(recipe, device, micro_batches, model)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
