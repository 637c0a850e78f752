"""Trains a head on a frozen backbone: the loop of `dinokit train-head`.

Checkpoints, the run's folder and the handling of signals are those of dinokit.train; a run that stops resumes
bit for bit on a CPU.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dinokit.config.load import read_recipe
from dinokit.data.objects import ObjectSource
from dinokit.data.sampler import process_places
from dinokit.features import fingerprint, frozen
from dinokit.models import Backbone
from dinokit.runtime.device import pick_device
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.launch import Watchdog, check_consistency, process_group, run_lock
from dinokit.runtime.log import RunLog
from dinokit.runtime.signals import Stopped, stop_signals
from dinokit.segment.encoder import Encoder, Items
from dinokit.segment.episodes import InContextTask
from dinokit.segment.questions import UnifiedTask
from dinokit.segment.recipe import Config
from dinokit.segment.rounds import PromptableTask
from dinokit.segment.saved import NAME, SavedHead, load_head, save_head
from dinokit.train import checkpoint
from dinokit.train.checkpoint import Checkpoints
from dinokit.train.not_finite import TrainingError
from dinokit.train.run_dir import image_facts, open_run
from dinokit.train.schedule import cosine

TASKS: dict[str, Any] = {
    "promptable": PromptableTask, "in_context": InContextTask, "unified": UnifiedTask
}  # fmt: skip


def train_head(cfg: Config, backbone: Backbone, source: ObjectSource) -> Path:
    """Train a head, or resume the run in the folder `cfg.run.out`. Returns the path of the head.

    Raises:
        ValueError: before the first step, if recipe, folder and images do not fit together.
        TrainingError: if the loss is not finite.
        OSError: if a checkpoint cannot be written.
        Stopped: after Ctrl-C or a termination signal, when all is saved.
    """
    device, out = pick_device(cfg.run.device), Path(cfg.run.out)
    with process_group(device, cfg.run.timeout_minutes) as watchdog, run_lock(out), frozen(backbone):
        HeadTrainer(cfg, backbone.to(device), source).fit(watchdog)
    return out / NAME


class HeadTrainer:
    """A run, from its start or from a checkpoint to its last step."""

    def __init__(self, cfg: Config, backbone: Backbone, source: ObjectSource) -> None:
        self.cfg, self.out, self.source = cfg, Path(cfg.run.out), source
        encoder = Encoder(backbone, cfg.size, cfg.layers)
        self.places = process_places(cfg.optim.batch, rank(), world_size(), key="optim.batch")
        self.facts = {"fingerprint of the backbone": fingerprint(backbone), **image_facts(cast(Any, source))}
        check_consistency(self.facts, self.out, "run.out")
        saved = checkpoint.to_resume(self.out, cfg.run.resume)
        torch.manual_seed(cfg.run.seed)
        self.task = TASKS[cfg.kind](cfg, Items(source, encoder, cfg.run.memory_gib))
        if cfg.start and saved is None:
            self._begin_with(cfg.start, backbone)
        self.head: nn.Module = self.task.head.to(encoder.device).train()
        kernels = [p for p in self.head.parameters() if p.ndim > 1]
        others = [p for p in self.head.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, cfg.optim.lr, weight_decay=cfg.optim.weight_decay, fused=True)
        self.start = saved.step if saved else 0
        open_run(cfg, lambda path: read_recipe(path, Config), "train-head")
        if saved is not None:
            self._resume(saved)
        sizes = asdict(cfg.context if cfg.kind == "in_context" else cfg.head)
        seen = encoder.side, cfg.layers, fingerprint(backbone)
        self.about = SavedHead(cfg.kind, sizes, *seen, cfg.objects, self.start, **self.task.about)

    def _begin_with(self, path: str, backbone: Backbone) -> None:
        """Take the weights of another head.

        Raises:
            ValueError, LookupError: if there is none, or it has another kind, other sizes or words, or
                another backbone.
        """
        head, _, about = load_head(path, backbone, self.cfg.kind)
        if about.kind != self.cfg.kind:
            raise ValueError(f"start={path} is a head of kind {about.kind}: set kind={about.kind}.")
        known = self.task.about.get("words", [])
        if about.words != known:
            raise ValueError(
                f"start={path} knows the words {', '.join(about.words) or '(none)'}, and the classes of "
                f"these objects have {', '.join(known) or '(none)'}: give objects with the same, or leave "
                f"start out."
            )
        aligned = self.task.head.state_dict()["table"].clone() if self.cfg.unified.align else None
        try:
            self.task.head.load_state_dict(head.state_dict())
        except RuntimeError:
            raise ValueError(
                f"start={path} has other sizes: {about.config | about.unified}. Give the recipe the same."
            ) from None
        if aligned is not None and not torch.allclose(aligned, head.state_dict()["table"].cpu(), atol=1e-5):
            raise ValueError(
                f"start={path} has other vectors of words than unified.align={self.cfg.unified.align}: give "
                f"the alignment that it was trained with, or leave start out."
            )

    def fit(self, watchdog: Watchdog) -> None:
        """Train until the last step, or until the run is stopped. Raises as train_head()."""
        cfg, steps = self.cfg, self.cfg.optim.steps
        checkpoints = Checkpoints(self.out / "checkpoints", cfg.run.keep)
        log = RunLog(self.out, steps, self.start)
        pending: list[dict[str, Tensor]] = []
        with stop_signals() as stop, log, checkpoints:
            size = sum(p.numel() for p in self.head.parameters())
            log.info(f"{cfg.name}: {len(self.source)} images, {size} parameters, run.out={self.out}")
            if self.start:
                log.info(f"resumes after step {self.start}")
            since = time.monotonic()
            for step in range(self.start, steps):
                watchdog.reset()
                pending.append(self._step(step))
                done = step + 1
                stopping = stop.on_any_process() and done < steps
                save = done % cfg.run.checkpoint_every == 0 or done == steps or stopping
                if done % cfg.run.log_every == 0 or save:
                    self._log(log, done, pending, time.monotonic() - since)
                    pending, since = [], time.monotonic()
                if save:
                    self._save(checkpoints, done)
                if stopping:
                    checkpoints.finish()
                    log.info(f"stopped after step {done}; the same command resumes from here")
                    raise Stopped
            checkpoints.finish()
            log.info(f"finished: {self.out / NAME}")

    def _step(self, step: int) -> dict[str, Tensor]:
        """One step of the optimiser. Returns sums over this process's images, of means over all."""
        cfg = self.cfg.optim
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * factor(step, cfg.steps, cfg.warmup)
        loss, logs = self.task.loss(step, self.places)
        self.optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in self.head.parameters() if p.grad is not None]
        if world_size() > 1:
            total = all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
            for grad, summed in zip(grads, total.split([g.numel() for g in grads]), strict=True):
                grad.copy_(summed.view_as(grad))
        if cfg.clip:
            nn.utils.clip_grad_norm_(self.head.parameters(), cfg.clip)
        self.optimizer.step()
        return logs

    def _log(self, log: RunLog, step: int, pending: list[dict[str, Tensor]], seconds: float) -> None:
        names = list(pending[0])
        table = all_reduce_sum(torch.stack([torch.stack([row[n].float() for n in names]) for row in pending]))
        if not table.isfinite().all():
            last = checkpoint.last_good(self.out / "checkpoints")
            raise TrainingError(
                f"The loss became infinite or NaN before step {step}. "
                f"{f'The last good checkpoint is {last}. ' if last else ''}Try a lower optim.lr or a longer "
                f"optim.warmup, in a new run.out."
            )
        values = dict(zip(names, table.mean(dim=0).tolist(), strict=True))
        speed = len(pending) * self.cfg.optim.batch / max(seconds, 1e-9)
        cfg = self.cfg.optim
        values |= {"lr": cfg.lr * factor(step - 1, cfg.steps, cfg.warmup), "images_per_second": speed}
        log.step(step, values)

    def _save(self, checkpoints: Checkpoints, step: int) -> None:
        if rank() == 0:
            self.about.steps = step
            save_head(self.out / NAME, self.head, self.about)
        checkpoints.save(step, checkpoint.named_tensors(self.head, self.head, self.optimizer), self.facts)

    def _resume(self, saved: checkpoint.SavedCheckpoint) -> None:
        """Restore head and optimiser.

        Raises:
            ValueError: if backbone or images are others, or the checkpoint is damaged.
        """
        for name, value in self.facts.items():
            if saved.values.get(name) != value:
                raise ValueError(
                    f"The {name} was {saved.values.get(name)} at {saved.path}, and now is {value}: a run "
                    f"resumes with what it began with. Bring it back, or choose another run.out."
                )
        checkpoint.verify(saved)
        tensors = checkpoint.read_targets(checkpoint.shapes(saved), self.head, self.head)
        checkpoint.load(saved, tensors)
        checkpoint.restore(tensors, self.head, self.head, self.optimizer)


def factor(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step: a line up to 1 over the warm-up, then a half cosine to 0."""
    fall = cosine(1.0, 0.0, max(step - warmup, 0), max(steps - warmup, 1))
    return fall * min(1.0, (step + 1) / max(warmup, 1))
