"""What happens around the steps of a run: values are logged, the state is saved, the teacher is judged."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.batch import Batch
from dinokit.models import Backbone
from dinokit.runtime.device import memory_share, peak_memory
from dinokit.runtime.distributed import all_reduce_sum, broadcast, gather_objects, rank, world_size
from dinokit.runtime.log import RunLog
from dinokit.train.blocks import as_written
from dinokit.train.checkpoint import Checkpoints
from dinokit.train.finite import check_finite
from dinokit.train.folder import save_teacher
from dinokit.train.parallel import whole_backbone
from dinokit.train.step import Step
from dinokit.train.unreadable import Unreadable
from dinokit.train.watchdog import Watchdog


@dataclass
class Evaluator:
    """A judge of the teacher, called every so many steps and at both ends of a run."""

    name: str
    every: int
    judge: Callable[[Backbone], Mapping[str, float]]


class Run:
    """A run between its first step and its last, or from a checkpoint on."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        step: Step,
        log: RunLog,
        evaluators: Sequence[Evaluator],
        unreadable: Unreadable,
        checkpoints: Checkpoints,
        images: Mapping[str, Any],
        watchdog: Watchdog,
    ) -> None:
        self.recipe, self.out, self.step, self.log = recipe, out, step, log
        self.evaluators, self.unreadable, self.checkpoints = evaluators, unreadable, checkpoints
        self.images, self.watchdog = images, watchdog
        self.pending: list[dict[str, Tensor]] = []
        self.unread: dict[str, str] = {}
        self.saved_at: int | None = None
        self.waited, self.since = 0.0, time.monotonic()

    def introduce(self, images: int, start: int) -> None:
        """Say what begins."""
        run, world, parts = self.recipe.run, world_size(), self.step.parts
        among = f", {world} processes" if world > 1 else ""
        what = f"{images} images, {self.step.device.type} {run.precision}{among}, run.out={self.out}"
        self.log.info(f"{self.recipe.name}: {what}")
        if parts != run.accumulate:
            self.log.info(
                f"each step in {parts} parts, not run.accumulate={run.accumulate}: so {world} processes keep "
                f"the batch of {self.recipe.optim.batch} images"
            )
        if start:
            self.log.info(f"goes on after step {start}")

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for them counted."""
        waiting = iter(batches)
        while True:
            self.watchdog.wind()
            begun = time.monotonic()
            try:
                batch = next(waiting)
            except StopIteration:
                return
            self.waited += time.monotonic() - begun
            yield batch

    def advance(self, batch: Batch) -> None:
        """One step, and what is due after it."""
        self.checkpoints.check()
        self.unread |= batch.unreadable
        self.pending.append(self.step(batch))
        done, run = batch.step + 1, self.recipe.run
        last = done == self.recipe.optim.steps
        if done % run.log_every == 0 or last:
            self.report(done)
        if done % run.checkpoint_every == 0 or last:
            self.save(done)  # first: an evaluation may take longer than a scheduler's warning leaves
        self.evaluate(done, always=last)

    def report(self, done: int) -> None:
        """Fetch the values of the last steps, in one wait for the device; log their means.

        Raises:
            TrainingError: if one is not finite.
        """
        if not self.pending:
            return
        names = list(self.pending[0])
        table = torch.stack([torch.stack([row[n].float() for n in names]) for row in self.pending])
        # Whether anybody has names to tell goes along: names are no tensors, and seldom.
        told = all_reduce_sum(torch.cat([table.flatten(), table.new_full((1,), len(self.unread))])).cpu()
        table = told[:-1].view(table.shape) / world_size()  # each is a mean over images, or alike everywhere
        if told[-1]:
            self._count_unreadable(done)
        first, count = done - len(self.pending), len(self.pending)
        check_finite(table, names, first, self.step.scaler, self.checkpoints)
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
                "memory_gib": peak_memory(self.step.device),
            },
        )
        self.pending.clear()
        self.waited, self.since = 0.0, time.monotonic()

    def evaluate(self, done: int, always: bool = False) -> None:
        """Let every evaluator that is due, or every one, judge the teacher, unless it has, at this step."""
        judged = broadcast(self.log.evaluated) if done == self.log.start else ()
        due = [e for e in self.evaluators if (always or done % e.every == 0) and e.name not in judged]
        if not due:
            return
        self.report(done)
        backbone = whole_backbone(self.recipe, self.step.model.average.backbone)
        self.watchdog.pause()  # an evaluation may take hours
        for evaluator in due:
            begun = time.monotonic()
            with self.log.paused(), as_written(self.recipe.run):
                scores = evaluator.judge(backbone)
            self.log.record(done, {f"{evaluator.name}/{key}": value for key, value in scores.items()})
            text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
            self.log.info(f"{evaluator.name} after step {done}: {text}  ({time.monotonic() - begun:.1f} s)")
        self.since = time.monotonic()

    def save(self, done: int) -> None:
        """A checkpoint to go on from, and the teacher for use; once a step."""
        if self.saved_at == done:
            return
        self.saved_at = done
        self.report(done)  # nothing that is not finite is ever saved
        backbone = whole_backbone(self.recipe, self.step.model.average.backbone)
        if rank() == 0:
            # The checkpoint comes last: a run that is killed in between does the last steps, and this, again.
            try:
                save_teacher(self.recipe, backbone, done)
            except OSError as error:
                raise OSError(self.checkpoints.trouble(done, error)) from None
        tensors, scaler = self.step.state()
        values = {
            "scaler": scaler,
            "unreadable": self.unreadable.state(),
            "images": dict(self.images),
            "images_at_once": self.step.images_at_once,
            "memory_share": memory_share(self.step.device),
        }
        self.checkpoints.save(done, tensors, values)

    def _count_unreadable(self, done: int) -> None:
        found = {name: why for part in gather_objects(self.unread) for name, why in part.items()}
        self.unread.clear()
        for line in self.unreadable.add(found, seen=done * self.recipe.optim.batch):
            self.log.info(line)
