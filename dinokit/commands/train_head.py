"""dinokit train-head RECIPE weights=FILE_OR_RUN [key=value ...]: train a head on frozen features, or resume.

RECIPE is a name in configs/ (head_*) or the path of a YAML file. backbone.name=NAME in place of weights=...
takes a backbone as its own code makes it. objects.name=LAYOUT and its keys give images with masks of objects.
Ctrl-C saves a checkpoint, and the same command resumes. The head is in head.safetensors of the run's folder.

dinokit train-head head_promptable_scenes weights=runs/demo
dinokit train-head head_promptable_scenes weights=runs/photos objects.name=sa1b objects.path=MASKS out=runs/h
"""

from collections.abc import Sequence
from typing import Any

from dinokit.commands import Command
from dinokit.commands import _frozen as frozen
from dinokit.config import registry
from dinokit.segment.recipe import Config

MULTI_PROCESS = RESUMES = True
SHORT = {**frozen.SHORT_KEYS, "batch": "optim.batch", "steps": "optim.steps"}


def words() -> list[str]:
    return registry.recipe_names("head")


def run(command: Command) -> dict[str, Any]:
    cfg = check(command)
    from dinokit.runtime.distributed import launch
    from dinokit.segment.training import train_head

    assert cfg.objects is not None
    backbone, weights = frozen.load_backbone(cfg, cfg.run.device), cfg.backbone.get("weights")
    head = train_head(cfg, backbone, frozen.open_source("data.objects", cfg.objects, backbone.channels))
    if weights and launch().rank == 0:
        prompts = {"in_context": "like=[EXAMPLE.jpg,MASK.png]", "unified": "text=WORDS"}
        prompt = prompts.get(cfg.kind, "points=[[X,Y,1]]")
        print(f"dinokit segment PHOTO.jpg weights={weights} head={head.parent} {prompt}")
    last = frozen.last_record(head.parent)
    return {"out": head.parent, "head": head, "steps": cfg.optim.steps, "last": last}


def check(command: Command) -> Config:
    """The checked settings.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, or neither weights nor backbone.
    """
    cfg: Config = frozen.check_recipe(command, "head", Config, "objects", "images with masks of objects")
    return cfg


def describe(words: Sequence[str]) -> str:
    return "\n".join(frozen.describe_recipe("head", Config))
