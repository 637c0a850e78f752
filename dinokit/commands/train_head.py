"""dinokit train-head RECIPE weights=FILE_OR_RUN [key=value ...]: train a head on frozen features, or resume.

RECIPE is a name in configs/ (head_*) or the path of a YAML file. backbone.name=NAME in place of weights=...
takes a backbone as its own code makes it. objects.name=LAYOUT and its keys give images with masks of objects.
Ctrl-C saves a checkpoint, and the same command resumes. The head is in head.safetensors of the run's folder.

dinokit train-head head_promptable_scenes weights=runs/demo
dinokit train-head head_promptable_scenes weights=runs/photos objects.name=sa1b objects.path=MASKS out=runs/h
"""

from collections.abc import Sequence
from typing import Any

from dinokit import evaluation
from dinokit.commands import Command, config_lines
from dinokit.commands._frozen import check_recipe
from dinokit.config import registry
from dinokit.segment.recipe import Config

MULTI_PROCESS = RESUMES = True
SHORT = {
    "weights": "backbone.weights",
    "out": "run.out",
    "device": "run.device",
    "seed": "run.seed",
    "batch": "optim.batch",
    "steps": "optim.steps",
}


def words() -> list[str]:
    return registry.recipe_names("head")


def run(command: Command) -> dict[str, Any]:
    cfg = check(command)
    section = dict(cfg.backbone)
    weights = section.pop("weights", None)
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.log import read_records
    from dinokit.segment.training import train_head

    backbone = evaluation.load_evaluated(weights, section or None, cfg.run.device)
    assert cfg.objects is not None
    settings = dict(cfg.objects)
    if "channels" in settings:
        settings["channels"] = backbone.channels
    head = train_head(cfg, backbone, registry.build("data.objects", settings))
    records = [record for record in read_records(head.parent) if "loss" in record]
    last: dict[str, Any] = records[-1] if records else {}
    if weights and launch().rank == 0:
        prompt = "like=[EXAMPLE.jpg,MASK.png]" if cfg.kind == "in_context" else "points=[[X,Y,1]]"
        print(f"dinokit segment PHOTO.jpg weights={weights} head={head.parent} {prompt}")
    return {"out": head.parent, "head": head, "steps": cfg.optim.steps, "last": last}


def check(command: Command) -> Config:
    """The checked settings.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, or neither weights nor backbone.
    """
    cfg: Config = check_recipe(command, "head", "segment", "recipe", Config)
    if cfg.objects is None:
        have = ", ".join(registry.names("data.objects"))
        raise ValueError(f"objects.name must be given, images with masks of objects; there is: {have}.")
    return cfg


def describe(words: Sequence[str]) -> str:
    recipes = f"recipes: {', '.join(registry.recipe_names('head'))}"
    return "\n".join([recipes, "keys:", *config_lines(Config)])
