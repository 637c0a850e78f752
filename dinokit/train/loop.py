"""The training loop, top to bottom: batch, step (dinokit/train/step.py); what is due after it (run.py)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinokit.config.load import Recipe
from dinokit.data.loader import training_loader
from dinokit.data.masks import BlockMasks
from dinokit.data.sources import ImageSource
from dinokit.models import Backbone
from dinokit.runtime.device import keep_freed_memory, pick_device
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.log import RunLog, first_and_last_scores
from dinokit.runtime.run_lock import run_lock
from dinokit.runtime.signals import Stopped, stop_signals
from dinokit.train import checkpoint
from dinokit.train.checkpoint import Checkpoints, Found
from dinokit.train.folder import open_run, with_precision
from dinokit.train.parallel import whole_backbone
from dinokit.train.parts import parts_of_step
from dinokit.train.processes import agree, images_of, joined
from dinokit.train.run import Evaluator, Run
from dinokit.train.start import begin, keep_start
from dinokit.train.step import Step
from dinokit.train.unreadable import Unreadable
from dinokit.train.watchdog import Watchdog

__all__ = ["Evaluator", "Run", "block_masks", "train"]


def train(recipe: Recipe, source: ImageSource, evaluators: Sequence[Evaluator] = ()) -> Path:
    """Run a recipe on a source of images, or go on with the run that is in its folder. Returns the folder.

    Raises:
        ValueError: before the first step, if recipe, folder and source do not fit together.
        TrainingError: if a loss is not finite, or too many images cannot be read.
        OSError: if a checkpoint cannot be written.
        Stopped: after Ctrl-C or a termination signal, when all is saved; not if that was the last
            step. After one of STOP_SIGNALS the process ignores these, because a launcher repeats them.
    """
    device = pick_device(recipe.run.device)
    keep_freed_memory(recipe.run)
    with joined(device, recipe.run.timeout_minutes) as watchdog, run_lock(Path(recipe.run.out)):
        return _train(recipe, source, evaluators, device, watchdog)


def _train(
    recipe: Recipe,
    source: ImageSource,
    evaluators: Sequence[Evaluator],
    device: torch.device,
    watchdog: Watchdog,
) -> Path:
    out = Path(recipe.run.out)
    agree(recipe, source, out)
    recipe = with_precision(recipe, device)
    found = checkpoint.latest(out / "checkpoints")
    parts = parts_of_step(recipe, world_size(), found.values if found else None)
    torch.manual_seed(recipe.run.seed)
    model, recipe = begin(recipe, first=found is None)
    step = Step(recipe, device, parts, model)
    masks = block_masks(recipe, step.model.student.backbone)
    batches = training_loader(  # checks the images against the recipe before run.out is made
        source, recipe.crops, masks, seed=recipe.run.seed, start_step=found.step if found else 0,
        steps=recipe.optim.steps, batch=recipe.optim.batch, rank=rank(), world=world_size(),
        accumulation=parts, workers=recipe.run.workers, pin=device.type == "cuda",
    )  # fmt: skip
    open_run(recipe)
    unreadable = Unreadable(recipe.run.max_unreadable, len(source))
    if found is None:
        keep_start(out, recipe, whole_backbone(recipe, step.model.student.backbone))
    images = images_of(source)
    start = _resume(found, step, unreadable, images)
    saved = Checkpoints(out / "checkpoints", recipe.run.keep, recipe.run.keep_every)
    with stop_signals() as stop, RunLog(out, recipe.optim.steps, start) as log, saved:
        run = Run(recipe, out, step, log, evaluators, unreadable, saved, images, watchdog)
        run.introduce(len(source), start)
        run.evaluate(start, always=start in (0, recipe.optim.steps))  # one that was cut short is done again
        for batch in run.timed(batches):
            run.advance(batch)
            if stop.on_any_process() and batch.step + 1 < recipe.optim.steps:  # after the last, it just ends
                run.save(batch.step + 1)
                saved.finish()
                log.info(f"stopped after step {batch.step + 1}; the same command resumes from here")
                raise Stopped
        saved.finish()
        for line in first_and_last_scores(out):
            log.info(line)
        log.info(f"done: {out / 'teacher.safetensors'}")
    return out


def block_masks(recipe: Recipe, backbone: Backbone) -> BlockMasks | None:
    """The mask generator for a recipe's global crops, or none."""
    side = recipe.crops.globals.size // backbone.patch
    return BlockMasks(recipe.masks, (side, side)) if recipe.masks is not None else None


def _resume(found: Found | None, step: Step, unreadable: Unreadable, images: dict[str, Any]) -> int:
    if found is None:
        return 0
    for what, value in found.values.get("images", images).items():
        if value != images[what]:
            raise ValueError(
                f"The {what} was {value} at {found.path}, and now is {images[what]}: a run goes on with the "
                f"images that it began with, each once a pass. Bring them back, or begin a new run with "
                f"run.out=ANOTHER backbone.weights={found.path.parents[1] / 'teacher.safetensors'}."
            )
    checkpoint.verify(found)
    tensors = step.targets(checkpoint.shapes(found))
    checkpoint.load(found, tensors)
    step.load(tensors, found.values["scaler"])
    unreadable.load(found.values["unreadable"])
    return found.step
