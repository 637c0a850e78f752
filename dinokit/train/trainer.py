"""Trains a student and its teacher: the training loop, from a recipe and images to a run's folder."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinokit.config.load import Recipe, unresolved
from dinokit.data.batch import Batch, names_of_step
from dinokit.data.sources import ImageSource
from dinokit.models import Backbone
from dinokit.runtime.device import keep_freed_memory, memory_share, peak_memory, pick_device
from dinokit.runtime.distributed import all_reduce_sum, broadcast, gather_objects, rank, world_size
from dinokit.runtime.launch import Watchdog, check_consistency, process_group, run_lock
from dinokit.runtime.log import RunLog, first_and_last_scores, read_records
from dinokit.runtime.signals import Stopped, stop_signals
from dinokit.runtime.trackers import Picture, check_installed
from dinokit.train import checkpoint
from dinokit.train.checkpoint import Checkpoints, SavedCheckpoint
from dinokit.train.health import diagnose
from dinokit.train.not_finite import SkippedSteps, TrainingError
from dinokit.train.parallel import eager, unsharded_backbone
from dinokit.train.run_dir import (
    changed_images,
    image_fingerprint,
    open_run,
    run_facts,
    save_teacher,
    with_precision,
)
from dinokit.train.step import SKIPPED, build_step
from dinokit.train.students import Students, resume_together, together

Draw = Callable[[Backbone], Mapping[str, Picture]]
Callback = Callable[[int, Mapping[str, float], Backbone], object]  # steps done, values, teacher -> stop?


class TooManyUnreadableError(RuntimeError):
    """More images than `run.max_unreadable` allows cannot be read."""

    exit_status = 4


@dataclass
class Evaluator:
    """An evaluation of the teacher, every so many steps and at both ends of a run."""

    name: str
    every: int
    evaluate: Callable[[Backbone], Mapping[str, float]]


def train(
    recipe: Recipe, source: ImageSource, evaluators: Sequence[Evaluator] = (), draw: Draw | None = None,
    callbacks: Sequence[Callback] = (), plan: dict[str, object] | None = None,
    students: Students | None = None,
) -> Path:  # fmt: skip
    """Run a recipe on a source of images, or resume the run that is in its folder. Returns the folder.

    Args:
        recipe: what to do.
        source: the images.
        evaluators: of the teacher, during the run.
        draw: pictures of the teacher for the trackers in run.log, at every evaluation.
        callbacks: called in every process with losses and rates, when they are logged, and with scores;
            one that returns True stops the run as Ctrl-C does.
        plan: what the run is expected to need, for plan.json.
        students: that are trained in this job, if there are several; the recipe is that of one of them.

    Raises:
        ValueError: before the first step, if recipe, folder and source do not fit together.
        TrainingError: if losses or gradients are not finite in all steps, or run.max_skipped + 1 in a row.
        TooManyUnreadableError: if too many images cannot be read.
        OSError: if a checkpoint cannot be written.
        Stopped: after Ctrl-C or a termination signal, when all is saved; not if that was the last step. After
            a signal of STOP_SIGNALS the process ignores these, because a launcher repeats them.
    """
    device, out = pick_device(recipe.run.device), Path(recipe.run.out)
    keep_freed_memory(recipe.run)
    with (
        process_group(device, recipe.run.timeout_minutes) as watchdog,
        together(students, recipe, source, device) as recipe,
        run_lock(out),
    ):
        check_consistency(run_facts(recipe, source), out, "run.out")
        Trainer(recipe, source, evaluators, device, watchdog, draw, callbacks, plan).fit()
    return out


class Trainer:
    """A run, from its start or from a checkpoint to its last step."""

    def __init__(
        self, recipe: Recipe, source: ImageSource, evaluators: Sequence[Evaluator], device: torch.device,
        watchdog: Watchdog, draw: Draw | None, callbacks: Sequence[Callback], plan: dict[str, object] | None,
    ) -> None:  # fmt: skip
        out = Path(recipe.run.out)
        recipe = with_precision(recipe, device)
        check_installed(recipe.run.log)
        saved = resume_together(out, checkpoint.to_resume(out, recipe.run.resume))
        recipe, self.step = build_step(recipe, device, saved)
        self.recipe, self.out, self.source = recipe, out, source
        self.images = broadcast(image_fingerprint(source) if rank() == 0 else None)
        self.changed_images: list[str] = []  # facts about the images that changed since the checkpoint
        self.evaluators, self.watchdog, self.draw, self.callbacks = evaluators, watchdog, draw, callbacks
        self.start = saved.step if saved else 0
        self.loader = self.step.loader(source, self.start, recipe.optim.steps)
        # After all checks: a recipe that does not fit its images leaves no folder.
        open_run(recipe, plan=plan)
        if saved is None and recipe.backbone.get("weights"):
            from dinokit.train.pretrained import save_start

            save_start(out, recipe, unsharded_backbone(recipe, self.step.model.student.backbone))
        self.unreadable = UnreadableImages(recipe.run.max_unreadable, len(source))
        self.skipped = SkippedSteps(recipe, self.step.scaler)
        if saved is not None:
            self.resume(saved)
        self.checkpoints = Checkpoints(out / "checkpoints", recipe.run.keep, recipe.run.keep_every)
        if saved is not None and self.step.shared_teacher is not None:
            self.checkpoints.remove_after(self.start)  # other students lack them
        label, settings = out.name if self.step.shared_teacher else "", unresolved(asdict(recipe))
        self.log = RunLog(out, recipe.optim.steps, self.start, recipe.run.log, settings, label)
        self.pending: list[dict[str, Tensor]] = []  # losses of steps that were not logged yet
        self.new_unreadable: dict[str, str] = {}
        self.data_wait, self.since = 0.0, time.monotonic()

    def fit(self) -> None:
        """Train until the last step, or until the run is stopped. Raises as train()."""
        with stop_signals() as self.stop, self.log, self.checkpoints:
            self.log_start()
            at_start = self.due_at_start()
            self.evaluate(self.start, at_start)
            evaluated = at_start or self.log.evaluated or self.start == self.recipe.optim.steps
            if evaluated and not self.log.has_verdict:  # a killed run may have missed it
                self.log_verdict(self.start)
            for batch in self.batches():
                self.pending.append(self.step(batch))
                self.after_step(batch.step + 1)
            self.checkpoints.finish()
            for line in first_and_last_scores(self.out):
                self.log.info(line)
            self.log.info(f"finished: {self.out / 'teacher.safetensors'}")

    def after_step(self, step: int) -> None:
        """Log, save and evaluate, as far as each is due after `step` steps. Raises as train()."""
        run, last = self.recipe.run, step == self.recipe.optim.steps
        stopping = self.stop.on_any_process() and not last
        save = step % run.checkpoint_every == 0 or last or stopping
        due = [e for e in self.evaluators if step % e.every == 0 or last]
        if step % run.log_every == 0 or save or due or self.losses_change_at(step):
            losses = self.fetch_losses(step)  # one wait for the device
            self.log_losses(self.without_skipped(losses, step), step)
            # After a skipped step none is saved: if more follow, the checkpoint from before is the good one.
            save = save and (not self.skipped_by_anyone() or last or stopping)
        if save:
            self.save_checkpoint(step)
        if due and not stopping:
            self.evaluate(step, due)
            stopping = self.stop.on_any_process() and not last
            if stopping and not save:
                self.save_checkpoint(step)
        if due or last:
            self.log_verdict(step)
        if stopping:
            self.checkpoints.finish()
            self.log.info(f"stopped after step {step}; the same command resumes from here")
            raise Stopped

    def skipped_by_anyone(self) -> bool:
        """Whether the last step was skipped; of several students, by any of them."""
        if self.step.shared_teacher is None:
            return self.skipped.in_a_row > 0
        return self.step.shared_teacher.is_any(self.skipped.in_a_row)

    def losses_change_at(self, step: int) -> bool:
        """Whether other losses count from this step on; all rows of `pending` must have the same names."""
        schedules = self.step.schedules
        return schedules.active_losses(step - 1) != schedules.active_losses(step)

    def batches(self) -> Iterator[Batch]:
        """The batches of the loader; counts the time spent waiting for them."""
        batches = iter(self.loader)
        while True:
            self.watchdog.reset()
            begin = time.monotonic()
            batch = next(batches, None)
            self.data_wait += time.monotonic() - begin
            if batch is None:
                return
            self.checkpoints.raise_failure()
            batch = self.step.shared_teacher(batch) if self.step.shared_teacher else batch
            self.new_unreadable |= batch.unreadable
            yield batch

    def fetch_losses(self, step: int) -> Tensor:
        """Losses and gradient norms (steps, names) since the last call, means over all processes."""
        names = list(self.pending[0])
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.pending])
        # With the number of new unreadable images: their names, which are no tensors, are seldom needed.
        count = table.new_full((1,), len(self.new_unreadable))
        sums = all_reduce_sum(torch.cat([table.flatten(), count])).cpu()
        if sums[-1]:
            self.count_unreadable(seen=step * self.recipe.optim.batch)
        return sums[:-1].view(table.shape) / world_size()

    def without_skipped(self, losses: Tensor, step: int) -> Tensor:
        """The rows of steps until `step` that were not skipped; records the others. Raises as train()."""
        found = self.skipped.add(losses, list(self.pending[0]), step)
        for number, wrong in found.items():
            run, batch = self.recipe.run, self.recipe.optim.batch
            names = names_of_step(self.source, run.seed, number - 1, batch, self.unreadable.reasons)
            self.log.record(number, {"skipped": {"not_finite": wrong, "seed": run.seed, "images": names}})
            self.log.info(
                f"step {number} was skipped, since these are not finite: {', '.join(wrong)}. To see why: "
                f"dinokit train {self.out}/recipe.yaml replay={number}"
            )
        if self.skipped.end_run(step):
            self.checkpoints.finish()
            raise TrainingError(self.skipped.message(checkpoint.last_good(self.checkpoints.folder)))
        first = step - len(losses) + 1
        return losses[[number not in found for number in range(first, step + 1)]] if found else losses

    def log_losses(self, losses: Tensor, step: int) -> None:
        """Log the means over `losses`, rows of steps since the last time, and the rates of the last step."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        schedules, names = self.step.schedules, list(self.pending[0])
        means = dict(zip(names, losses.mean(dim=0).tolist(), strict=True))
        del means[SKIPPED]
        values = {
            **means,
            "lr": schedules.lr(step - 1),
            "weight_decay": schedules.weight_decay(step - 1),
            "momentum": schedules.momentum(step - 1),
            "teacher_temp": schedules.teacher_temp(step - 1),
            **({"skipped_steps": self.skipped.total} if self.skipped.total else {}),
            "images_per_second": len(self.pending) * self.recipe.optim.batch / seconds,
            "data_wait": self.data_wait / seconds,
            "memory_gib": peak_memory(self.step.device),
        }
        self.log.step(
            step,
            values,
            shown={*self.step.model.loss_names, "crop_agreement", "feature_rank", "lr", "images_per_second"},
        )
        self.pending.clear()
        self.call(step, values)
        self.data_wait, self.since = 0.0, time.monotonic()

    def call(self, step: int, values: Mapping[str, float]) -> None:
        """Give values after `step` steps to the callbacks; True from one of them stops the run."""
        if not self.callbacks:
            return
        backbone = unsharded_backbone(self.recipe, self.step.model.ema.backbone)
        with self.log.paused(), eager(self.recipe.run):
            answers = [callback(step, values, backbone) for callback in self.callbacks]  # all are called
            if any(answer is True for answer in answers):
                self.stop.received.append(signal.SIGINT)

    def log_start(self) -> None:
        """Log what is trained on what."""
        run, world, n = self.recipe.run, world_size(), self.step.accumulation
        processes = f", {world} processes" if world > 1 else ""
        self.log.info(
            f"{self.recipe.name}: {len(self.source)} images, {self.step.device.type} {run.precision}"
            f"{processes}, run.out={self.out}"
        )
        if n != run.accumulate:
            self.log.info(
                f"each step in {n} micro-batches, not run.accumulate={run.accumulate}: so {world} processes "
                f"have the batch of {self.recipe.optim.batch} images"
            )
        if self.start:
            self.log.info(f"resumes after step {self.start}")
        if self.start >= self.recipe.optim.steps:
            self.log.info(
                f"all {self.start} steps were done before. The schedules end there; another run trains on: "
                f"dinokit train {self.out}/recipe.yaml weights={self.out} out=ANOTHER_FOLDER"
            )
        if self.changed_images:
            self.log.info(f"images changed since the checkpoint: {', '.join(self.changed_images)}")

    def due_at_start(self) -> list[Evaluator]:
        """At the start all evaluators; after a resumption those that were interrupted at this step."""
        finished = broadcast(self.log.evaluated)
        everyone = self.start in (0, self.recipe.optim.steps)
        due = [e for e in self.evaluators if everyone or self.start % e.every == 0]
        return [e for e in due if e.name not in finished]

    def evaluate(self, step: int, evaluators: Sequence[Evaluator]) -> None:
        """Evaluate the teacher after `step` steps, and record the scores."""
        if not evaluators:
            return
        backbone = unsharded_backbone(self.recipe, self.step.model.ema.backbone)
        self.watchdog.pause()  # an evaluation may take hours
        for evaluator in evaluators:
            begin = time.monotonic()
            with self.log.paused(), eager(self.recipe.run):
                scores = evaluator.evaluate(backbone)
            self.log.scores(step, evaluator.name, scores, time.monotonic() - begin)
            self.call(step, {f"{evaluator.name}/{key}": value for key, value in scores.items()})
        if self.draw:
            self.log.trackers.pictures(step, partial(self.draw, backbone))
        self.since = time.monotonic()

    def log_verdict(self, step: int) -> None:
        """Log what is wrong with the run so far, if anything is."""
        verdict = diagnose(read_records(self.out), self.recipe, len(self.source)) if rank() == 0 else None
        if verdict:
            self.log.record(step, {"verdict": verdict.name, "advice": verdict.text})
            self.log.info(f"verdict after step {step}: {verdict.name}: {verdict.text}")

    def save_checkpoint(self, step: int) -> None:
        """Save the teacher for use, and a checkpoint to resume from.

        No student begins a checkpoint before all have written the last one, so that they can resume together.
        """
        if self.step.shared_teacher is not None:
            self.checkpoints.finish()
            self.step.shared_teacher.wait()
        backbone = unsharded_backbone(self.recipe, self.step.model.ema.backbone)
        if rank() == 0:
            # The checkpoint comes last: a run that is killed in between repeats the last steps, and this.
            try:
                save_teacher(self.recipe, backbone, step)
            except OSError as error:
                raise OSError(self.checkpoints.failure(step, error)) from None
        tensors, scaler = self.step.state()
        values = {
            "scaler": scaler,
            "unreadable": list(self.unreadable.reasons),
            "skipped": [self.skipped.total, self.skipped.in_a_row],
            "images": self.images,
            "licence": self.step.model.ema.backbone.licence,
            "images_at_once": self.step.images_at_once,
            "memory_share": memory_share(self.step.device),
        }
        self.checkpoints.save(step, tensors, values)

    def resume(self, saved: SavedCheckpoint) -> None:
        """Restore model, optimiser and counts from a checkpoint.

        Raises:
            ValueError: if the images changed, or the checkpoint is damaged or of another model.
        """
        before = saved.values.get("images", self.images)
        self.changed_images = changed_images(self.recipe, self.images, before, saved.path)
        self.step.restore(saved)
        self.unreadable.reasons = dict.fromkeys(saved.values["unreadable"], "")
        self.skipped.total, self.skipped.in_a_row = saved.values.get("skipped", (0, 0))
        self.step.model.ema.backbone.licence = saved.values.get("licence", "")

    def count_unreadable(self, seen: int) -> None:
        """Log the unreadable images of all processes that are new. Raises as UnreadableImages.add()."""
        reasons = {name: why for each in gather_objects(self.new_unreadable) for name, why in each.items()}
        self.new_unreadable.clear()
        for line in self.unreadable.add(reasons, seen):
            self.log.info(line)


class UnreadableImages:
    """The unreadable images met so far.

    Args:
        share: of the images that may be unreadable.
        images: in the source.
    """

    def __init__(self, share: float, images: int) -> None:
        self.share, self.images = share, images
        self.reasons: dict[str, str] = {}  # by name, in the order met; "" from a checkpoint

    def add(self, reasons: Mapping[str, str], seen: int) -> list[str]:
        """Count unreadable images. Returns a line for each that is new.

        Args:
            reasons: by name of the image, which may be known already, why it cannot be read.
            seen: images read since the start of the run.

        Raises:
            TooManyUnreadableError: if they are more than `share` of the source, or of the first thousand
                images seen.
        """
        new = {name: why for name, why in reasons.items() if name not in self.reasons}
        self.reasons.update(new)
        count, tried = len(self.reasons), min(self.images, max(seen, 1000))
        if new and count > self.share * tried:
            known = list(dict.fromkeys(why.rstrip(".") for why in self.reasons.values() if why))
            names = ", ".join(list(self.reasons)[:5])
            raise TooManyUnreadableError(
                f"{count} of {tried} images cannot be read, more than "
                f"run.max_unreadable={self.share:g}: {names}{', ...' if count > 5 else ''}. "
                f"Why: {'; '.join(known[:3])}. Repair or remove them, or allow more, such as "
                f"run.max_unreadable={min(1.0, 2 * count / tried):.2g}."
            )
        return [f"cannot be read, left out: {name}: {why}" for name, why in new.items()]
