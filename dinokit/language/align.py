"""Trains a text alignment on a frozen backbone: the loop of `dinokit align`, which is transformers' Trainer.

Views are fixed, so the backbone sees each image once: its tokens stay in memory, where they fit. Which images
and captions a step has is a function of the seed and the step's number, so a run that is killed goes on from
Trainer's last checkpoint, on a CPU with the same numbers as one that was never killed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinokit.data.batch import stack
from dinokit.data.captions import CaptionSource
from dinokit.data.sampler import process_places
from dinokit.features import fingerprint
from dinokit.language import needed
from dinokit.language.align_recipe import Config
from dinokit.language.aligned import NAME, About, FrozenTokens, ImageHead, save_aligned
from dinokit.language.losses import ContrastLoss, step_figures
from dinokit.language.text import TextTower, build_tower
from dinokit.language.trainer import keys_of_run, last_checkpoint, training_arguments
from dinokit.models import Backbone
from dinokit.runtime.device import pick_device
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.launch import Watchdog
from dinokit.runtime.log import RunLog, watch
from dinokit.runtime.signals import Stopped, StopSignal, stop_signals

CHUNK = 128  # images whose tokens are computed at a time
NO_CAPTION = -2  # number of a text that is no caption of any image
SAMPLE = 512  # images whose tokens give the mean and deviation of each channel


class Pairs(Dataset[dict[str, Any]]):
    """The items of all steps, in their order: an image and one of its captions.

    Each pass over the images is a permutation by (seed, pass). A caption is drawn in two steps: a kind, then
    one of that kind.

    Args:
        source: the images with their captions.
        count: items.
        seed: of the draws.
        exchanged: as in the recipe.
        pixels: makes the square of an image, where tokens are not kept.
    """

    def __init__(
        self, source: CaptionSource, count: int, seed: int, exchanged: bool = False, pixels: Any = None
    ) -> None:
        self.source, self.count, self.seed = source, count, seed
        self.exchanged, self.pixels = exchanged, pixels
        self.kinds = [source.captions(index) for index in range(len(source))]
        texts = dict.fromkeys(text for kinds in self.kinds for kind in kinds for text in kind)
        self.texts = [*texts]
        self._number = {text: number for number, text in enumerate(self.texts)}
        self.most = max(sum(len(kind) for kind in kinds) for kinds in self.kinds)
        self._pass, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> dict[str, Any]:
        passed, place = divmod(item, len(self.kinds))
        if passed != self._pass:
            self._order = np.random.default_rng([self.seed, 0, passed]).permutation(len(self.kinds))
            self._pass = passed
        index = int(self._order[place])
        kinds, rng = self.kinds[index], np.random.default_rng([self.seed, 1, item])
        texts = [_draw(kinds, rng)]
        if self.exchanged:
            twins = self.source.exchanged(index) if hasattr(self.source, "exchanged") else None
            texts.append(_draw(kinds, rng) if twins is None else twins[1])
        numbers = [self._number[each] for every in kinds for each in every]
        found = {"index": index, "texts": texts}
        found["numbers"] = [self._number.get(text, NO_CAPTION) for text in texts]
        found["captions"] = numbers + [-1] * (self.most - len(numbers))
        if self.pixels is not None:
            found["pixels"] = self.pixels(self.source[index][0])
        return found


def _draw(kinds: Sequence[Sequence[str]], rng: np.random.Generator) -> str:
    kind = kinds[int(rng.integers(len(kinds)))]
    return kind[int(rng.integers(len(kind)))]


class Collate:
    """Makes the arguments of Alignment.forward() of some items."""

    def __init__(self, tower: TextTower, tokens: Tensor | None) -> None:
        self.tower, self.tokens = tower, tokens

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.tower.tokenize([text for item in items for text in item["texts"]])
        batch["numbers"] = torch.tensor([number for item in items for number in item["numbers"]])
        batch["captions"] = torch.tensor([item["captions"] for item in items])
        if self.tokens is not None:
            batch["tokens"] = self.tokens[torch.tensor([item["index"] for item in items])]
        else:
            batch["pixels"] = stack([item["pixels"] for item in items])
        return batch


class Alignment(nn.Module):
    """What is trained: head, tower of texts with its projection, and the loss."""

    def __init__(self, cfg: Config, frozen_tokens: FrozenTokens, tower: TextTower) -> None:
        super().__init__()
        self.head = ImageHead(cfg.head, frozen_tokens.width, frozen_tokens.grid)
        self.tower = tower
        self.project = nn.Linear(tower.width, cfg.head.embedding, bias=False)
        self.loss = ContrastLoss(cfg.loss)
        self._frozen = frozen_tokens  # no module: it is neither trained nor saved
        self.figures: list[dict[str, Tensor]] = []  # of the steps that no line of the log has

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, numbers: Tensor, captions: Tensor,
        tokens: Tensor | None = None, pixels: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`loss`, of this process's rows, as dinokit.language.losses has it; its figures are kept."""
        if tokens is None:
            assert pixels is not None
            tokens = self._frozen(pixels)
        images = self.head(tokens)
        texts = self.project(self.tower(input_ids, attention_mask))
        with torch.autocast(images.device.type, enabled=False):
            loss = self.loss(images, texts, captions, numbers)
        figures = step_figures(F.normalize(images.detach().float(), dim=1), texts.float(), captions, numbers)
        self.figures.append({"loss": loss.detach(), **figures, "scale": self.loss.log_scale.detach().exp()})
        return {"loss": loss}


def train(cfg: Config, backbone: Backbone, source: CaptionSource, watchdog: Watchdog) -> Path:
    """Align, or resume the run in the folder `cfg.run.out`. Returns the path of the head.

    Args:
        cfg: of a run whose folder exists.
        backbone: frozen, on its device.
        source: the images with their captions.
        watchdog: is reset after every step.

    Raises:
        ValueError: before the first step, if recipe, backbone and images do not fit together; or if the loss
            is not finite.
        Stopped: after Ctrl-C or a termination signal, when all is saved.
    """
    needed("accelerate")
    out, device = Path(cfg.run.out), pick_device(cfg.run.device)
    places = process_places(cfg.optim.batch, rank(), world_size(), key="optim.batch")
    seen = FrozenTokens(backbone.to(device), cfg.view)
    last = last_checkpoint(out / "checkpoints")
    if cfg.run.resume == "must" and last is None:
        raise ValueError(f"run.resume=must, but there is no checkpoint in {out / 'checkpoints'}.")
    start = int(last.name.partition("-")[2]) if last else 0
    with stop_signals() as stop, RunLog(out, cfg.optim.steps, start) as log:
        kept = len(source) * seen.tokens * seen.width * 2 <= cfg.run.memory_gib * 2**30
        count, pixels = cfg.optim.steps * cfg.optim.batch, None if kept else seen.square
        pairs = Pairs(source, count, cfg.run.seed, cfg.exchanged, pixels)
        torch.manual_seed(cfg.run.seed)
        tower = build_tower(cfg.text, (text for kinds in pairs.kinds for kind in kinds for text in kind))
        model = Alignment(cfg, seen, tower)
        tokens = first_tokens(seen, source, watchdog, len(source) if kept else SAMPLE)
        model.head.standardise(tokens[:SAMPLE])
        _greet(cfg, log, model, pairs, kept, start)
        collate = Collate(tower, tokens if kept else None)
        del tokens
        trainer = make_trainer(cfg, model, pairs, collate, len(places), log, stop, watchdog)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if trainer.state.global_step < cfg.optim.steps:
            log.info(f"stopped after step {trainer.state.global_step}; the same command resumes from here")
            raise Stopped
        if rank() == 0:
            about = About(
                asdict(cfg.view), asdict(cfg.head), tower.pool, tower.length, fingerprint(backbone), cfg.data,
                cfg.optim.steps,
            )  # fmt: skip
            about.view["size"] = seen.side
            save_aligned(out, model.head, model.project, tower, about)
        log.info(f"finished: {out / NAME}")
    return out / NAME


def first_tokens(seen: FrozenTokens, source: CaptionSource, watchdog: Watchdog, most: int) -> Tensor:
    """The tokens of the first images, at most `most`: (n, T, D) float16 on the CPU, in chunks of one size."""
    count = min(len(source), most)
    tokens = torch.empty(count, seen.tokens, seen.width, dtype=torch.float16)
    starts = range(0, count, CHUNK)
    for start in watch(starts, len(starts), "tokens"):
        squares = [seen.square(source[index][0]) for index in range(start, min(start + CHUNK, count))]
        tokens[start : start + CHUNK] = seen(stack(squares)).cpu()
        watchdog.reset()
    return tokens


def _greet(cfg: Config, log: RunLog, model: Alignment, pairs: Pairs, kept: bool, start: int) -> None:
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.head, model.tower)]
    log.info(
        f"{cfg.name}: {len(pairs.kinds)} images, {len(pairs.texts)} captions, {sizes[0]} parameters of the "
        f"head, {sizes[1]} of the tower of texts, run.out={cfg.run.out}"
    )
    if not kept:
        log.info("tokens of all images do not fit into run.memory_gib: they are computed in every step")
    chosen = pairs.texts[:: max(1, len(pairs.texts) // 2000)]
    cut = model.tower.cut(chosen)
    if cut:
        log.info(f"{cut} of {len(chosen)} captions are longer than text.length={model.tower.length} and cut")
    if start:
        log.info(f"resumes after step {start}")


def make_trainer(
    cfg: Config, model: Alignment, pairs: Pairs, collate: Collate, batch: int, log: RunLog, stop: StopSignal,
    watchdog: Watchdog,
) -> Any:  # fmt: skip
    """A Trainer of transformers, with the items in their order.

    Args:
        cfg: the recipe.
        model: to train.
        pairs: all items.
        collate: of a batch.
        batch: items of this process in a step.
        log: of the run.
        stop: asked after each step.
        watchdog: reset after each step.
    """
    transformers = needed("transformers")

    class Follower(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        """Writes the log, and stops where it is asked to."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watchdog.reset()
            last = state.global_step >= cfg.optim.steps
            if stop.on_any_process() and not last:
                control.should_save = control.should_training_stop = last = True
            if last:  # steps that log_every does not divide have a line too
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "learning_rate" in logs:  # Trainer's summary of the run has none
                _log(log, state.global_step, model.figures, float(logs["learning_rate"]))

    trainer = transformers.Trainer(
        model=model,
        args=training_arguments(cfg.run.device, **_arguments(cfg, batch)),
        train_dataset=pairs,
        data_collator=collate,
        optimizers=_optimizers(cfg, model),
        callbacks=[Follower()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _log(log: RunLog, step: int, figures: list[dict[str, Tensor]], lr: float) -> None:
    """Write the means since the last call. A process has those of its own images.

    Raises:
        ValueError: if the loss is not finite.
    """
    means = {name: float(torch.stack([row[name] for row in figures]).mean()) for name in figures[0]}
    figures.clear()
    if not math.isfinite(means["loss"]):
        raise ValueError(
            f"The loss became infinite or NaN before step {step}. Try a lower optim.lr or a longer "
            f"optim.warmup, in a new run.out."
        )
    log.step(step, {**means, "lr": lr})


def _arguments(cfg: Config, batch: int) -> dict[str, Any]:
    """The keys of TrainingArguments."""
    return {
        **keys_of_run(cfg.run),
        "output_dir": str(Path(cfg.run.out) / "checkpoints"),
        "max_steps": cfg.optim.steps,
        "per_device_train_batch_size": batch,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": cfg.optim.clip,
    }


def _optimizers(cfg: Config, model: Alignment) -> tuple[Any, Any]:
    """AdamW with no decay of vectors and of the scale, and its schedule."""
    optim, groups = cfg.optim, []
    for of_text in (False, True):
        for matrix in (True, False):
            chosen = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and (p.ndim > 1) == matrix and name.startswith("tower.") == of_text
            ]
            decay = optim.weight_decay if matrix else 0.0
            lr = optim.text_lr or optim.lr if of_text else optim.lr
            groups += [{"params": chosen, "lr": lr, "weight_decay": decay}] if chosen else []
    optimizer = torch.optim.AdamW(groups, optim.lr, betas=optim.betas)
    transformers = needed("transformers")
    warmup = min(optim.warmup, optim.steps)
    return optimizer, transformers.get_cosine_schedule_with_warmup(optimizer, warmup, optim.steps)
