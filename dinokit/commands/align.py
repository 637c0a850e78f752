"""dinokit align RECIPE weights=FILE_OR_RUN [key=value ...]: bring images and texts together, or resume.

RECIPE is a name in configs/ (align_*) or the path of a YAML file. backbone.name=NAME in place of weights=...
takes a backbone as its own code makes it. data.name=LAYOUT and its keys give images with captions. Ctrl-C
saves a checkpoint, and the same command resumes. The run's folder then has head.safetensors and text/.

dinokit align align_captioned_cpu weights=runs/demo
dinokit align align_coco weights=runs/photos data.path=IMAGES data.annotations=captions.json out=runs/aligned
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinokit.commands import Command
from dinokit.commands import _frozen as frozen
from dinokit.config import registry
from dinokit.config.load import read_recipe
from dinokit.language.align_recipe import Config

MULTI_PROCESS = RESUMES = True
SHORT = {
    **frozen.SHORT_KEYS,
    "workers": "run.workers",
    "precision": "run.precision",
    "batch": "optim.batch",
    "steps": "optim.steps",
}


def words() -> list[str]:
    return registry.recipe_names("align")


def run(command: Command) -> dict[str, Any]:
    cfg = check(command)
    from dinokit.features import fingerprint
    from dinokit.language.align import train
    from dinokit.language.trainer import check_began
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.launch import check_consistency, digest, process_group, run_lock
    from dinokit.train.run_dir import TIMES, image_fingerprint, open_run

    device, out = pick_device(cfg.run.device), Path(cfg.run.out)
    assert cfg.data is not None
    with process_group(device, cfg.run.timeout_minutes) as watchdog, run_lock(out):
        backbone = frozen.load_backbone(cfg, cfg.run.device)
        source = frozen.open_source("data.captions", cfg.data, backbone.channels)
        facts = {"fingerprint of the backbone": fingerprint(backbone), **image_fingerprint(source)}
        facts["captions"] = digest([source.captions(index) for index in range(len(source))])
        del facts[TIMES]  # copied images are the same images
        check_consistency(facts, out, "run.out")
        open_run(cfg, lambda path: read_recipe(path, Config), "align")
        check_began(out, facts, cfg.run.resume == "never")
        head = train(cfg, backbone, source, watchdog)
    if cfg.backbone.get("weights") and launch().rank == 0:
        print(f"dinokit eval zeroshot weights={cfg.backbone['weights']} align={out} test.path=LABELLED")
    return {"out": out, "head": head, "steps": cfg.optim.steps, "last": frozen.last_record(out)}


def check(command: Command) -> Config:
    """The checked settings.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, or neither weights nor backbone.
    """
    cfg: Config = frozen.check_recipe(command, "align", Config, "data", "images with captions")
    return cfg


def describe(words: Sequence[str]) -> str:
    return "\n".join(frozen.describe_recipe("align", Config))
