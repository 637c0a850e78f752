"""dinokit align RECIPE weights=FILE_OR_RUN [key=value ...]: bring images and texts together, or resume.

RECIPE is a name in configs/ (align_*) or the path of a YAML file. backbone.name=NAME in place of weights=...
takes a backbone as its own code makes it. data.name=LAYOUT and its keys give images with captions. Ctrl-C
saves a checkpoint, and the same command resumes. The run's folder then has head.safetensors and text/.

dinokit align align_captioned_cpu weights=runs/demo
dinokit align align_coco weights=runs/photos data.path=IMAGES data.annotations=captions.json out=runs/aligned
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dinokit import evaluation
from dinokit.commands import Command, config_lines
from dinokit.commands._frozen import check_recipe, read_recipe
from dinokit.config import registry
from dinokit.language.align_recipe import Config

MULTI_PROCESS = RESUMES = True
SHORT = {
    "weights": "backbone.weights",
    "out": "run.out",
    "device": "run.device",
    "seed": "run.seed",
    "workers": "run.workers",
    "precision": "run.precision",
    "batch": "optim.batch",
    "steps": "optim.steps",
}


def words() -> list[str]:
    return registry.recipe_names("align")


def run(command: Command) -> dict[str, Any]:
    cfg = check(command)
    section = dict(cfg.backbone)
    weights = section.pop("weights", None)
    from dinokit.features import fingerprint
    from dinokit.language.align import train
    from dinokit.language.trainer import check_began
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.launch import check_consistency, digest, process_group, run_lock
    from dinokit.runtime.log import read_records
    from dinokit.train.run_dir import TIMES, image_fingerprint, open_run

    device, out = pick_device(cfg.run.device), Path(cfg.run.out)
    assert cfg.data is not None
    with process_group(device, cfg.run.timeout_minutes) as watchdog, run_lock(out):
        backbone = evaluation.load_evaluated(weights, section or None, cfg.run.device)
        settings = dict(cfg.data)
        if "channels" in settings:
            settings["channels"] = backbone.channels
        source = registry.build("data.captions", settings)
        facts = {"fingerprint of the backbone": fingerprint(backbone), **image_fingerprint(source)}
        facts["captions"] = digest([source.captions(index) for index in range(len(source))])
        del facts[TIMES]  # copied images are the same images
        check_consistency(facts, out, "run.out")
        open_run(cfg, partial(read_recipe, room="language", module="align_recipe", config=Config), "align")
        check_began(out, facts, cfg.run.resume == "never")
        head = train(cfg, backbone, source, watchdog)
    records = [record for record in read_records(out) if "loss" in record]
    last: dict[str, Any] = records[-1] if records else {}
    if weights and launch().rank == 0:
        print(f"dinokit eval zeroshot weights={weights} align={out} test.path=LABELLED")
    return {"out": out, "head": head, "steps": cfg.optim.steps, "last": last}


def check(command: Command) -> Config:
    """The checked settings.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, or neither weights nor backbone.
    """
    cfg: Config = check_recipe(command, "align", "language", "align_recipe", Config)
    if cfg.data is None:
        have = ", ".join(registry.names("data.captions"))
        raise ValueError(f"data.name must be given, images with captions; there is: {have}.")
    return cfg


def describe(words: Sequence[str]) -> str:
    recipes = f"recipes: {', '.join(registry.recipe_names('align'))}"
    return "\n".join([recipes, "keys:", *config_lines(Config)])
