"""The training loop, top to bottom: batch, step (dinokit/train/step.py); log, evaluate, save."""

import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dinokit.backbones import Backbone
from dinokit.config import Recipe, to_yaml
from dinokit.data.batch import Batch
from dinokit.data.loader import loader
from dinokit.data.masks import BlockMasks
from dinokit.data.sources import Source
from dinokit.device import pick_device, pick_precision
from dinokit.distributed import launched, rank, world_size
from dinokit.log import RunLog, before_and_after
from dinokit.train import checkpoint
from dinokit.train.folder import open_run, saved_precision
from dinokit.train.start import fill_from_weights, keep_start
from dinokit.train.step import Step
from dinokit.train.unreadable import Unreadable
from dinokit.weights import save_backbone

LEAST_SCALE = 1e-3  # of fp16's gradients: it halves with every overflow


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what happened and what to try."""


@dataclass
class Evaluator:
    """A judge of the teacher, called every so many steps and at both ends of a run."""

    name: str
    every: int
    judge: Callable[[Backbone], Mapping[str, float]]


def train(recipe: Recipe, source: Source, evaluators: Sequence[Evaluator] = ()) -> Path:
    """Run a recipe on a source of images, or go on with the run that is in its folder. Returns the folder.

    Raises:
        ValueError: before the first step, if recipe, folder and source do not fit together.
        TrainingError: if a loss is not finite, or too many images cannot be read.
        OSError: if a checkpoint cannot be written.
        KeyboardInterrupt: after Ctrl-C or a termination signal, when all is saved.
    """
    if launched() > 1:
        raise ValueError(
            f"{launched()} processes were started together, but dinokit trains in one process yet. Start "
            f"one; run.accumulate=N cuts a large batch into N parts."
        )
    device = pick_device(recipe.run.device)
    wanted = recipe.run.precision
    precision = pick_precision(saved_precision(recipe) if wanted == "auto" else wanted, device)
    recipe = replace(recipe, run=replace(recipe.run, precision=precision))
    torch.manual_seed(recipe.run.seed)
    step = Step(recipe, device)
    recipe = fill_from_weights(recipe, step.model.student, step.model.average)
    masks = block_masks(recipe, step.model.student.backbone)
    out = open_run(recipe)
    unreadable = Unreadable(recipe.run.max_unreadable, len(source))
    keep_start(out, recipe, step.model.student)
    start = _resume(out, step, unreadable, device)
    with RunLog(out, recipe.optim.steps, start) as log, _stop_signals() as stopping:
        log.say(f"{recipe.name}: {len(source)} images, {device.type} {recipe.run.precision}, run.out={out}")
        if start:
            log.say(f"goes on after step {start}")
        run = Run(recipe, out, step, log, evaluators, unreadable)
        if not start:
            run.evaluate(0, always=True)
        batches = loader(
            source, recipe.crops, masks, seed=recipe.run.seed, start_step=start, steps=recipe.optim.steps,
            batch=recipe.optim.batch, rank=rank(), world=world_size(), workers=recipe.run.workers,
            pin=device.type == "cuda",
        )  # fmt: skip
        for batch in run.timed(batches):
            run.advance(batch)
            if stopping():
                run.save(batch.step + 1)
                log.say(f"stopped after step {batch.step + 1}; the same command goes on from here")
                raise KeyboardInterrupt
        for line in before_and_after(out):
            log.say(line)
        log.say(f"done: {out / 'teacher.safetensors'}")
    return out


class Run:
    """What happens around the steps: log, evaluation, checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        step: Step,
        log: RunLog,
        evaluators: Sequence[Evaluator],
        unreadable: Unreadable,
    ) -> None:
        self.recipe, self.out, self.step, self.log = recipe, out, step, log
        self.evaluators, self.unreadable = evaluators, unreadable
        self.pending: list[dict[str, Tensor]] = []
        self.waited, self.since = 0.0, time.monotonic()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for them counted."""
        waiting = iter(batches)
        while True:
            begun = time.monotonic()
            try:
                batch = next(waiting)
            except StopIteration:
                return
            self.waited += time.monotonic() - begun
            yield batch

    def advance(self, batch: Batch) -> None:
        """One step, and what is due after it."""
        for line in self.unreadable.add(batch.unreadable, seen=(batch.step + 1) * self.recipe.optim.batch):
            self.log.say(line)
        self.pending.append(self.step(batch))
        done, run = batch.step + 1, self.recipe.run
        last = done == self.recipe.optim.steps
        if done % run.log_every == 0 or last:
            self.report(done)
        self.evaluate(done, always=last)
        if done % run.checkpoint_every == 0 or last:
            self.save(done)

    def report(self, done: int) -> None:
        """Fetch the values of the last steps, in one wait for the device; log their means.

        Raises:
            TrainingError: if one is not finite.
        """
        if not self.pending:
            return
        names = list(self.pending[0])
        table = torch.stack([torch.stack([row[n].float() for n in names]) for row in self.pending]).cpu()
        first, count = done - len(self.pending), len(self.pending)
        self._check_finite(table, names, first)
        seconds = max(time.monotonic() - self.since, 1e-9)
        s = self.step.schedules
        self.log.step(
            done,
            {
                **dict(zip(names, table.mean(dim=0).tolist(), strict=True)),
                "lr": s.lr(done - 1),
                "weight_decay": s.weight_decay(done - 1),
                "momentum": s.momentum(done - 1),
                "teacher_temp": s.teacher_temp(done - 1),
                "images_per_second": count * self.recipe.optim.batch / seconds,
                "data_wait": self.waited / seconds,
                "memory_gib": _peak_memory(self.step.device),
            },
        )
        self.pending.clear()
        self.waited, self.since = 0.0, time.monotonic()

    def evaluate(self, done: int, always: bool = False) -> None:
        """Let every evaluator that is due, or every one, judge the teacher."""
        due = [e for e in self.evaluators if always or done % e.every == 0]
        if not due:
            return
        self.report(done)
        for evaluator in due:
            begun = time.monotonic()
            scores = evaluator.judge(self.step.model.average.backbone)
            self.log.record(done, {f"{evaluator.name}/{key}": value for key, value in scores.items()})
            text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
            self.log.say(f"{evaluator.name} after step {done}: {text}  ({time.monotonic() - begun:.1f} s)")
        self.since = time.monotonic()

    def save(self, done: int) -> None:
        """A checkpoint to go on from, and the teacher for use."""
        self.report(done)  # nothing that is not finite is ever saved
        if rank() == 0:
            # The checkpoint comes last: a run that is killed in between does the last steps, and this, again.
            backbone, text = self.step.model.average.backbone, to_yaml(self.recipe)
            save_backbone(self.out / "teacher.safetensors", backbone, self.recipe.architecture, text)
            state = {**self.step.state(), "unreadable": self.unreadable.state()}
            checkpoint.save(self.out / "checkpoints", done, state, self.recipe.run.keep)

    def _check_finite(self, table: Tensor, names: list[str], first: int) -> None:
        bad = (~table.isfinite()).nonzero()
        scale = self.step.scaler.get_scale()
        if scale < LEAST_SCALE:
            raise TrainingError(
                f"In fp16 every step of late overflowed: the loss scale fell to {scale:g}. Take "
                f"run.precision=bf16 or fp32, in a new run.out."
            )
        skips = self.step.scaler.is_enabled()  # an fp16 overflow of a gradient is the scaler's business
        bad = bad[[not (skips and names[int(column)].startswith("grad_")) for _, column in bad]]
        if len(bad):
            row, column = (int(i) for i in bad[0])
            last = checkpoint.latest(self.out / "checkpoints")
            raise TrainingError(
                f"'{names[column]}' became {table[row, column].item()} in step {first + row + 1}. "
                f"{f'The last good checkpoint is {last}.' if last else 'No checkpoint was written yet.'} "
                f"To try, one at a time, in a new run.out: a lower optim.lr, a longer optim.warmup, a "
                f"smaller optim.clip, a lower second teacher.temp, run.precision=fp32."
            )


def block_masks(recipe: Recipe, backbone: Backbone) -> BlockMasks | None:
    """The mask generator for a recipe's global crops, or none."""
    side = recipe.crops.globals.size // backbone.patch
    return BlockMasks(recipe.masks, (side, side)) if recipe.masks is not None else None


def _resume(out: Path, step: Step, unreadable: Unreadable, device: torch.device) -> int:
    path = checkpoint.latest(out / "checkpoints")
    if path is None:
        return 0
    state = checkpoint.load(path, device)
    step.load(state)
    unreadable.load(state["unreadable"])
    return int(state["step"])


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C or termination asks the loop to save and end; the second ends at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
