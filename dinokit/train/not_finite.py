"""Steps whose losses or gradients are not finite: which were skipped, and what made them so.

A step that is skipped changes no weights (dinokit/train/step.py). A few in a row are counted, and recorded
with the names of their images; more end the run, and so do all of a short run. replay() repeats one and says
which images made it so.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.config.load import Recipe, load_recipe
from dinokit.data.batch import Batch, names_of_step
from dinokit.data.sampler import process_places
from dinokit.data.sources import ImageSource
from dinokit.runtime.device import pick_device
from dinokit.runtime.distributed import full, gather_objects, rank, world_size
from dinokit.runtime.launch import process_group
from dinokit.runtime.log import info
from dinokit.train import checkpoint
from dinokit.train.run_dir import changed_images, differences, image_fingerprint, with_precision
from dinokit.train.schedule import least_images
from dinokit.train.step import SKIPPED, Step, build_step
from dinokit.train.student_teacher import GUIDE

MIN_SCALE = 1e-3  # of fp16's gradients: the scale halves with every overflow
GRADIENT = "grad_"  # begins the names of gradient norms among the values of a step


class TrainingError(RuntimeError):
    """A run that cannot continue; the message says what happened and what to try."""

    exit_status = 4


class SkippedSteps:
    """Counts the steps of a run that were skipped.

    Args:
        recipe: of the run.
        scaler: of its gradients. In fp16 an overflow of gradients is no fault: the scale falls, and the step
            is not counted.
    """

    def __init__(self, recipe: Recipe, scaler: torch.amp.GradScaler) -> None:
        self.recipe, self.scaler = recipe, scaler
        self.total = self.in_a_row = 0
        self.overflows = 0  # of fp16, since this process began
        self.scale = 1.0  # of fp16's gradients, after their last overflow
        self.last = ""  # what happened in the last one

    def add(self, values: Tensor, names: Sequence[str], step: int) -> dict[int, list[str]]:
        """Count the skipped steps among those until `step`, at most until they are too many in a row.

        Args:
            values: (steps, names), what Step returned, as means over all processes.
            names: of losses, signals, gradients and SKIPPED.
            step: number of the last step, from 1.

        Returns:
            The number of each skipped step, with the names of losses and gradients that are not finite.
        """
        found: dict[int, list[str]] = {}
        for number, row in enumerate(values.tolist(), step - len(values) + 1):
            named = dict(zip(names, row, strict=True))
            if not named[SKIPPED]:
                self.in_a_row = 0
                continue
            known = _losses_and_gradients(names, self.recipe)
            wrong = [name for name in known if not math.isfinite(named[name])]
            if self.scaler.is_enabled() and all(name.startswith(GRADIENT) for name in wrong):
                self.scale, self.overflows = self.scaler.get_scale(), self.overflows + 1
                continue
            found[number] = wrong
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            self.last = f"'{wrong[0]}' became {named[wrong[0]]} in step {number}"
            if self.in_a_row > self.recipe.run.max_skipped:
                break
        return found

    def end_run(self, step: int) -> bool:
        """Whether the run must end after `step` steps: too many were skipped, or all until the last."""
        too_many = self.in_a_row > self.recipe.run.max_skipped or self.scale < MIN_SCALE
        return too_many or step == self.recipe.optim.steps == self.total + self.overflows

    def message(self, last: Path | None) -> str:
        """Why the run ends, and what to try; `last` is its newest checkpoint."""
        if self.scale < MIN_SCALE:
            return (
                f"In fp16 every recent step overflowed: the loss scale fell to {self.scale:g}. "
                f"Set run.precision=bf16 or fp32, in a new run.out."
            )
        if self.overflows and self.total + self.overflows == self.recipe.optim.steps:
            return (
                f"In fp16 gradients overflowed in {self.overflows} of {self.recipe.optim.steps} steps and no "
                f"step was taken, so nothing was learnt. The loss scale, now {self.scale:g}, falls with each "
                f"overflow: give more optim.steps, or run.precision=bf16 or fp32, in a new run.out."
            )
        skipped = f"; {self.in_a_row} steps in a row were skipped" if self.in_a_row > 1 else ""
        if self.total == self.recipe.optim.steps:
            skipped = f"; all steps of the run ({self.total}) were skipped, so nothing was learnt"
        good = f"The last good checkpoint is {last}." if last else "No checkpoint was written yet."
        return (
            f"{self.last}{skipped}, and run.max_skipped={self.recipe.run.max_skipped}. {good} metrics.jsonl "
            f"names the images of these steps. To try, one at a time, in a new run.out: a lower optim.lr, a "
            f"longer optim.warmup, a smaller optim.clip, a lower second teacher.temp, run.precision=fp32."
        )


@dataclass
class Replay:
    """A step of a run that was repeated, and what is not finite in it; names in the order of the batch."""

    step: int  # from 1
    seed: int  # of the run
    start: int  # steps of the checkpoint that it was repeated from
    not_finite: list[str]  # losses and gradients
    pixels: list[str]  # images whose crops are not finite
    groups: list[tuple[list[str], list[str]]]  # losses that are not finite among a few images; these images
    weights: list[str]  # parameters of the student before the step
    images: int  # in the step

    def lines(self) -> list[str]:
        """For people."""
        begin = f"Step {self.step} (run.seed={self.seed}) was repeated from step {self.start}: "
        if not self.not_finite:
            return [f"{begin}all losses and gradients are finite here."]
        lines = [f"{begin}not finite are {', '.join(self.not_finite)}."]
        if self.weights:
            lines.append(
                f"Before the step {len(self.weights)} tensors of weights are not finite, such as "
                f"{self.weights[0]}: the run diverged earlier. A lower optim.lr or a longer optim.warmup "
                f"helps."
            )
            return lines
        if self.pixels:
            lines.append(f"Images with pixels that are not finite: {', '.join(self.pixels)}.")
        lines += [
            f"Images with losses that are not finite: {', '.join(images)} ({', '.join(losses)})."
            for losses, images in self.groups
        ]
        if not self.pixels and not self.groups:
            lines.append(
                f"Each loss is finite for a few images at a time: it is not one image, but all "
                f"{self.images} together, or the gradients alone. run.precision=fp32 helps if they are "
                f"too large for a smaller type."
            )
        return lines


def replay(recipe: Recipe, source: ImageSource, number: int) -> Replay:
    """Repeat step `number` (from 1) of the run in run.out, from the checkpoint before it, and look at it.

    Without such a checkpoint it begins at step 0. Nothing is written. With several processes all call it.

    Raises:
        LookupError: if there is no run.
        ValueError: if recipe, images or step are not those of the run, or its checkpoint is damaged.
    """
    out, device = Path(recipe.run.out), pick_device(recipe.run.device)
    file = out / "recipe.yaml"
    if not file.is_file():
        raise LookupError(f"replay={number} repeats a step of a run, and run.out={out} has none.")
    recipe = with_precision(recipe, device)
    if changes := differences(load_recipe(file, of_run=True), recipe):
        raise ValueError(f"replay={number} needs the recipe of the run, {file}: {'; '.join(changes)}.")
    if not 1 <= number <= recipe.optim.steps:
        raise ValueError(f"replay={number}: the run has the steps 1 to {recipe.optim.steps}.")
    with process_group(device, recipe.run.timeout_minutes) as watchdog:
        saved = checkpoint.before(out / "checkpoints", number)
        recipe, step = build_step(recipe, device, saved)
        start, unreadable = 0, dict[str, str]()
        if saved is not None:
            images = image_fingerprint(source)
            changed_images(recipe, images, saved.values.get("images", images), saved.path)
            step.restore(saved)
            start, unreadable = saved.step, dict.fromkeys(saved.values["unreadable"], "")
        if number - start > 1:
            info(f"repeats the steps {start + 1} to {number - 1} first")
        for batch in step.loader(source, start, number):
            watchdog.reset()
            unreadable |= batch.unreadable
            if batch.step < number - 1:
                step(batch)
        for each in gather_objects(unreadable):
            unreadable |= each
        names = names_of_step(source, recipe.run.seed, number - 1, recipe.optim.batch, unreadable)
        return _examine(step, batch, names, start)


def _examine(step: Step, batch: Batch, names: Sequence[str], start: int) -> Replay:
    """Take a step, whose images have these names by place, and say what is not finite in it."""
    recipe = step.recipe
    result = Replay(batch.step + 1, recipe.run.seed, start, [], [], [], [], len(names))
    result.weights = [name for name, p in step.model.student.named_parameters() if not _finite(full(p))]
    values = step(batch)
    wrong = [name for name, value in values.items() if name != SKIPPED and not _finite(value)]
    everywhere = {name for each in gather_objects(wrong) for name in each}
    known = _losses_and_gradients(values, recipe)
    result.not_finite = [name for name in known if name in everywhere]
    if not values[SKIPPED]:
        return result
    places = process_places(recipe.optim.batch, rank(), world_size(), step.accumulation)
    ours = _look_at_images(step, batch, [names[place] for place in places])
    for pixels, groups in gather_objects(ours):
        result.pixels += pixels
        result.groups += groups
    result.pixels.sort(key=names.index)
    return result


@torch.no_grad()
def _look_at_images(
    step: Step, batch: Batch, names: Sequence[str]
) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """Images of this process whose crops are not finite; and small groups with losses that are not."""
    crops = step.augment(batch)
    sound = torch.stack([
        x.flatten(1).isfinite().all(dim=1).view(-1, batch.images).all(dim=0)
        for x in (crops.global_crops, crops.local_crops)
        if len(x)
    ]).all(dim=0)  # fmt: skip
    least = least_images(step.recipe)[1]
    size = next(n for n in range(least, batch.images + 1) if batch.images % n == 0)
    temp, active = step.schedules.teacher_temp(batch.step), step.schedules.active_losses(batch.step)
    groups = []
    for i, part in enumerate(batch.split(batch.images // size)):
        with step.autocast():
            losses: dict[str, Any] = step.replica(step.augment(part), temp, active)
        wrong = [name for name, value in losses.items() if not _finite(value)]
        if wrong:
            groups.append((wrong, list(names[i * size : (i + 1) * size])))
    return [name for name, fine in zip(names, sound.tolist(), strict=True) if not fine], groups


def _losses_and_gradients(names: Iterable[str], recipe: Recipe) -> list[str]:
    """The names of a step's losses and gradients, losses first; its other values are signals."""
    names = [*names]
    losses = [name for name in names if name.removeprefix(GUIDE) in recipe.losses]
    return losses + [name for name in names if name.startswith(GRADIENT)]


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
