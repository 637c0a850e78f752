"""Trains a model that answers, stage by stage, by the Trainer of transformers: `dinokit instruct`.

The loss of a step is the sum over all its supervised tokens divided by their number, over all processes and
parts of a batch: Trainer counts them before the step. Each stage has its own optimiser and schedule. A stage
that is stopped resumes from Trainer's checkpoint, bit for bit on a CPU; a finished one from its model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import SequentialSampler

from dinokit.data.talks import TalkSource
from dinokit.language import needed
from dinokit.language.labels import Collate, marked
from dinokit.language.lora import add_lora, merge_lora
from dinokit.language.model import (
    ABOUT,
    CONNECTOR,
    Answerer,
    about,
    build_model,
    folder_of,
    open_model,
    save_model,
)
from dinokit.language.recipe import Config, Stage, stages_of
from dinokit.language.stages import Order, Shares, prepared, shares, steps_of
from dinokit.language.trainer import (
    check_began,
    keys_of_run,
    last_checkpoint,
    stay_frozen,
    training_arguments,
)
from dinokit.models import Backbone
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.files import remove
from dinokit.runtime.launch import Watchdog
from dinokit.runtime.log import RunLog
from dinokit.runtime.signals import Stopped, StopSignal, stop_signals

CONNECTORS = tuple(f"model.{name}" for name in CONNECTOR)  # names of its parameters begin with one
TRAINED = "trained.safetensors"  # of a checkpoint: the parameters of the stage and no others
FAR = 4  # times, between the sizes of image tokens and of rows of the embedding
DONE = "stages"  # folder of the run with the models of the stages before the last


def train(cfg: Config, backbone: Backbone, talks: Mapping[str, TalkSource], watchdog: Watchdog) -> Path:
    """Train all stages, or resume the run in the folder `cfg.run.out`. Returns the folder of the model.

    Args:
        cfg: of a run whose folder exists.
        backbone: frozen.
        talks: by name of the stage.
        watchdog: is reset after every step.

    Raises:
        ValueError: before the first step, if recipe, models and talks do not fit together; or if the loss is
            not finite.
        Stopped: after Ctrl-C or a termination signal, when all is saved.
    """
    out, stages = Path(cfg.run.out), stages_of(cfg)
    total = {name: steps_of(stage, len(talks[name])) for name, stage in stages.items()}
    facts = about(cfg, backbone)
    began = {f"data of stage {name}": source.fingerprint() for name, source in talks.items()}
    anew = cfg.run.resume == "never"
    if anew and rank() == 0:
        for path in (out / "model", out / DONE):
            remove(path)
    check_began(out, {"fingerprint of the backbone": facts["fingerprint"], **began}, anew)
    places = {name: _place(out, name, [*stages]) for name in stages}
    done = [name for name in stages if (places[name] / "config.json").is_file()]
    before = sum(total[name] for name in done)
    for name in [name for name in stages if name not in done][:1]:
        last = last_checkpoint(out / "checkpoints" / name)
        before += int(last.name.partition("-")[2]) if last else 0
    if cfg.run.resume == "must" and not before:
        raise ValueError(f"run.resume=must, but run.out={out} has no checkpoint. Leave it out to begin anew.")
    answerer = open_model(places[done[-1]]) if done else _begin(cfg, backbone)
    if cfg.start:
        facts["language"] = started_from(cfg).get("language", facts["language"])
    material = {  # of all stages: errors come before the first step of the first
        name: prepared(cfg, name, total[name], talks[name], answerer) for name in stages if name not in done
    }
    with stop_signals() as stop, RunLog(out, sum(total.values()), before) as log:
        _greet(cfg, answerer, log, done, before)
        base = 0
        for name, stage in stages.items():
            if name not in done:
                run = StageRun(cfg, name, stage, total[name], base, log, stop, watchdog)
                run.train(answerer, *material[name])
                if rank() == 0:
                    save_model(answerer, places[name], {**facts, "stages": [*done, name], "steps": total})
                    remove(out / "checkpoints" / name)  # the model is what goes on from here
                done.append(name)
            base += total[name]
        log.info(f"finished: {out / 'model'}")
    return out / "model"


def started_from(cfg: Config) -> dict[str, Any]:
    """What the model of `start` records of its making; nothing, where dinokit has not saved it."""
    file = folder_of(cfg.start) / ABOUT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _begin(cfg: Config, backbone: Backbone) -> Answerer:
    fresh = build_model(cfg, backbone)
    if not cfg.start:
        return fresh
    saved, own = open_model(cfg.start), asdict(cfg.connector)
    theirs = started_from(cfg).get("connector", own)
    if theirs != own:
        raise ValueError(
            f"start={cfg.start} has the connector {theirs}, and the recipe asks for {own}: give the recipe "
            f"that of the start."
        )
    for key in ("vision_config", "vision_feature_layer", "vision_feature_select_strategy"):
        ours, theirs = (getattr(each.model.config, key) for each in (fresh, saved))
        if key != "vision_config" and ours != theirs:
            raise ValueError(f"start={cfg.start} has {key}={theirs}, and the recipe asks for {ours}.")
    tower = saved.model.model.vision_tower.state_dict()
    for name, value in fresh.model.model.vision_tower.state_dict().items():
        if name not in tower or not torch.equal(tower[name], value):
            raise ValueError(f"start={cfg.start} was trained on another backbone. Give that one.")
    return saved


def _place(out: Path, name: str, names: Sequence[str]) -> Path:
    return out / "model" if name == names[-1] else out / DONE / name


def _greet(cfg: Config, answerer: Answerer, log: RunLog, done: Sequence[str], before: int) -> None:
    counts = {
        part: sum(p.numel() for p in answerer.parameters(part).values()) for part in ("connector", "language")
    }
    seen, rows = answerer.scales()
    log.info(
        f"{cfg.name}: {type(answerer.model).__name__}, {counts['connector']:,} parameters of the connector, "
        f"{counts['language']:,} of the language model; run.out={cfg.run.out}"
    )
    if math.isfinite(seen):
        log.info(f"rms of image tokens {seen:.3g}, of rows of the embedding {rows:.3g}")
        if not rows / FAR <= seen <= rows * FAR:
            log.info("these are far apart: the language model may need more steps before it reads the images")
    if before:
        finished = f", with {', '.join(done)} finished" if done else ""
        log.info(f"resumes after step {before}{finished}")


@dataclass
class StageRun:
    """One stage, from its start or from a checkpoint to its last step."""

    cfg: Config
    name: str
    stage: Stage
    steps: int
    base: int  # steps of the stages before
    log: RunLog
    stop: StopSignal
    watchdog: Watchdog

    def train(self, answerer: Answerer, order: Order, collate: Collate) -> None:
        """Change the model in place."""
        cfg, stage = self.cfg, self.stage
        part = shares(stage, self.name, world_size())
        chosen = trained_parameters(answerer, stage, cfg)
        folder = Path(cfg.run.out) / "checkpoints" / self.name
        self.log.info(
            f"stage {self.name}: {self.steps} steps of {stage.batch} talks, {len(order.talks):,} talks; "
            f"trains {', '.join(stage.trains)}: {sum(p.numel() for p in chosen.values()):,} parameters"
        )
        if cfg.run.checkpointing:
            decoder = answerer.model.model.language_model
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if cut := collate.labels.cut:
            self.log.info(
                f"{cut} of the first {collate.labels.checked} talks are longer than length={cfg.length} "
                f"tokens and lose their last turns"
            )
        self.log.info(f"a talk, with what is learnt in brackets: {marked(answerer.tokenizer, order[0])}")
        trainer = make_trainer(self, answerer, chosen, order, collate, part, folder)
        last = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if trainer.state.global_step < self.steps:
            self.log.info("stopped; the same command resumes from here")
            raise Stopped
        answerer.model.eval()
        if "lora" in stage.trains:
            merge_lora(answerer)


def trained_parameters(answerer: Answerer, stage: Stage, cfg: Config) -> dict[str, nn.Parameter]:
    """The parameters that a stage changes, by name; all others are frozen, and those of the tower always."""
    answerer.model.requires_grad_(False)
    stay_frozen(answerer.model.model.vision_tower)
    chosen: dict[str, nn.Parameter] = {}
    for part in stage.trains:
        torch.manual_seed(cfg.run.seed)
        chosen |= add_lora(answerer, cfg.lora) if part == "lora" else answerer.parameters(part)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def make_trainer(
    run: StageRun, answerer: Answerer, chosen: Mapping[str, nn.Parameter], order: Order, collate: Collate,
    part: Shares, folder: Path,
) -> Any:  # fmt: skip
    """The Trainer of transformers for a stage, which saves the trained parameters alone."""
    transformers = needed("transformers")
    needed("accelerate")
    cfg, stage = run.cfg, run.stage

    base: Any = transformers.Trainer

    class StageTrainer(base):  # type: ignore[misc]
        """With talks in their order, two rates, and checkpoints of what is trained."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(order)

        def create_optimizer(self, *_: Any, **__: Any) -> Any:
            if getattr(self, "optimizer", None) is None:
                self.optimizer: Any = torch.optim.AdamW(groups(chosen, stage), stage.lr, betas=(0.9, 0.999))
            return self.optimizer

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **keys: Any) -> Any:
            loss = super().compute_loss(model, inputs, *more, **keys)
            if "pixel_values" in inputs:
                return loss
            # Without an image the connector has no gradient, and processes with one would wait for it.
            idle = [value.sum() for name, value in chosen.items() if name.startswith(CONNECTORS)]
            return loss + 0.0 * sum(idle) if idle else loss

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            target = Path(output_dir or self.args.output_dir)
            target.mkdir(parents=True, exist_ok=True)
            values = state_dict if state_dict is not None else chosen
            tensors = {name: values[name].detach().cpu().contiguous() for name in chosen}
            save_file(tensors, target / TRAINED)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            saved = load_file(Path(resume_from_checkpoint) / TRAINED)
            if saved.keys() != chosen.keys():
                raise ValueError(f"{resume_from_checkpoint} is of a stage that trained other parameters.")
            with torch.no_grad():
                for name, parameter in chosen.items():
                    parameter.copy_(saved[name])

    trainer = StageTrainer(
        model=answerer.model,
        args=training_arguments(cfg.run.device, **arguments(cfg, stage, run.steps, part, folder)),
        train_dataset=order,
        data_collator=collate,
        callbacks=[_follower(transformers.TrainerCallback, run, answerer)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def arguments(cfg: Config, stage: Stage, steps: int, part: Shares, folder: Path) -> dict[str, Any]:
    """The keys of TrainingArguments for a stage."""
    return {
        **keys_of_run(cfg.run),
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": part.micro,
        "gradient_accumulation_steps": part.parts,
        "learning_rate": stage.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(stage.warmup * steps),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.clip,
        "average_tokens_across_devices": True,
    }


def groups(chosen: Mapping[str, nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """Parameters by rate and decay; vectors, such as norms, biases and the newline, have no decay."""
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in chosen.items():
        connector = name.startswith(CONNECTORS)
        matrix = parameter.ndim > 1 and not name.endswith("latents")  # queries would shrink to nothing
        found.setdefault((connector, matrix), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": stage.connector_lr or stage.lr if connector else stage.lr,
            "weight_decay": stage.weight_decay if matrix else 0.0,
        }
        for (connector, matrix), parameters in found.items()
    ]


def _follower(base: Any, run: StageRun, answerer: Answerer) -> Any:
    """A callback that writes the run's log, stops when asked, and keeps what is frozen in eval mode."""

    class Follower(base):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.watchdog.reset()
            if run.stop.on_any_process() and state.global_step < run.steps:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"The loss became infinite or NaN before step {run.base + state.global_step}. Try a "
                    f"lower stages.{run.name}.lr or a longer warmup, in a new run.out."
                )
            shown = {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "gradient": logs.get("grad_norm", 0.0),
            }
            run.log.step(run.base + state.global_step, {name: float(value) for name, value in shown.items()})

    return Follower()
