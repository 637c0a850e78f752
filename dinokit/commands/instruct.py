"""dinokit instruct RECIPE weights=FILE_OR_RUN [key=value ...]: train a model that answers, or resume.

A connector and a language model learn to answer questions on images through a frozen backbone, in stages.
RECIPE is a name in configs/ (instruct_*) or the path of a YAML file. backbone.name=NAME in place of
weights=... takes a backbone as its own code makes it. Ctrl-C saves a checkpoint, and the same command
resumes. The model is in model/ of the run's folder; transformers opens it without dinokit.

dinokit instruct instruct_captioned_cpu weights=runs/demo
dinokit instruct instruct_llava15_qwen05b weights=BACKBONE language.path=QWEN data.path=MIX.json
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, config_lines
from dinokit.commands import _frozen as frozen
from dinokit.config import registry
from dinokit.config.load import merge_settings, read_recipe, section_values
from dinokit.config.registry import suggest
from dinokit.language.recipe import Config, Stage, stages_of

if TYPE_CHECKING:
    from dinokit.data.talks import TalkSource

MULTI_PROCESS = RESUMES = True
SHORT = frozen.SHORT_KEYS


def words() -> list[str]:
    return registry.recipe_names("instruct")


def run(command: Command) -> dict[str, Any]:
    cfg = check(command)
    from dinokit.language import needed

    for package in ("transformers", "accelerate"):
        needed(package)
    if any("lora" in stage.trains for stage in stages_of(cfg).values()):
        needed("peft", "lora")
    from dinokit import features
    from dinokit.language.instruct import train
    from dinokit.language.model import without_bars
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.launch import process_group, run_lock
    from dinokit.train.run_dir import open_run

    without_bars()
    talks = {name: talks_of(cfg, stage) for name, stage in stages_of(cfg).items()}
    backbone = frozen.load_backbone(cfg, "cpu")
    out, device = Path(cfg.run.out), pick_device(cfg.run.device)
    with process_group(device, cfg.run.timeout_minutes) as watchdog, run_lock(out), features.frozen(backbone):
        open_run(cfg, lambda path: read_recipe(path, Config), "instruct")
        model = train(cfg, backbone, talks, watchdog)
    if launch().rank == 0:
        print(f'dinokit ask {out} PHOTO.jpg "describe the picture"')
    return {"out": out, "model": model, "last": frozen.last_record(out)}


def talks_of(cfg: Config, stage: Stage) -> "TalkSource":
    """The talks of a stage: those of the recipe, with the stage's own keys."""
    source: TalkSource = registry.build("data.talks", _checked(cfg, stage))
    return source


def _checked(cfg: Config, stage: Stage) -> dict[str, Any]:
    section = _section(cfg, stage)
    name = section.pop("name", "")
    return {"name": name, **section_values("data.talks", name, section, "data")}


def _section(cfg: Config, stage: Stage) -> dict[str, Any]:
    """The section of a stage's talks. With a name of its own it has nothing of the recipe's."""
    data = cfg.data or {}
    other = stage.data.get("name", data.get("name")) != data.get("name")
    return merge_settings({} if other else data, stage.data)


def check(command: Command) -> Config:
    """The checked settings.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, or neither weights nor backbone.
    """
    cfg: Config = frozen.check_recipe(command, "instruct", Config, "data", "talks about images")
    for name, stage in stages_of(cfg).items():
        kind = _section(cfg, stage)["name"]
        have = [field.name for field in fields(registry.read_config("data.talks", kind))]
        unknown = [key for key in stage.data if key not in ("name", *have)]
        if unknown:
            raise ValueError(
                f"stages.{name}.data.{unknown[0]}: talks '{kind}' have no such key. There is: "
                f"{', '.join(have)}.{suggest(unknown[0], have)} "
                f"stages.{name}.data={{}} removes all keys there."
            )
        _checked(cfg, stage)
    return cfg


def describe(words: Sequence[str]) -> str:
    stage = [line.replace("    ", "    stages.NAME.", 1) for line in config_lines(Stage)]
    return "\n".join([*frozen.describe_recipe("instruct", Config), *stage])
