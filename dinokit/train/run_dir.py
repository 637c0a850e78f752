"""A run's folder: recipe.yaml, env.json, plan.json, metrics.jsonl, run.log, checkpoints/, teacher weights.

dinokit train also writes report.html there, at its end. pca_basis.safetensors has the colours of its pictures
and of those for trackers. Evaluators of dense maps have a folder of their name in it.

It belongs to one recipe. With the same recipe the run resumes; with another one, that is an error.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dinokit.config.load import Recipe, load_recipe, to_yaml
from dinokit.data.sources import ImageSource, content_hash, image_states
from dinokit.models import Backbone
from dinokit.runtime.device import pick_device, pick_precision
from dinokit.runtime.distributed import broadcast, gather_objects, rank, world_size
from dinokit.runtime.files import TEMPORARY, atomic, remove, write_text
from dinokit.runtime.launch import LOCK, digest
from dinokit.train.checkpoint import ONCE

# Settings that may change when a run resumes, because they do not change what it learns.
FREE = (
    "evals", "backbone.fingerprint", "run.out", "run.device", "run.workers", "run.log_every",
    "run.checkpoint_every", "run.keep", "run.keep_every", "run.max_unreadable", "run.max_skipped",
    "run.parallel", "run.timeout_minutes", "run.attention", "run.compile", "run.checkpointing", "run.logits",
    "run.tokens", "run.keep_memory", "run.resume", "run.report", "run.images", "run.memory_gib",
    "data.memory_gib",
)  # fmt: skip
STATED, CONTENTS = 100_000, 64  # images whose state, and whose content, a checkpoint records
TIMES = "times of images"  # may change, as when images are copied, if sizes and contents do not
NAMES = 64  # images whose names are compared between processes
PACKAGES = ("dinokit", "torch", "torchvision", "timm", "numpy", "pillow", "omegaconf", "safetensors")


def _read_run(path: Path) -> Recipe:
    return load_recipe(path, of_run=True)


def open_run(
    recipe: Any,
    read: Callable[[Path], Any] = _read_run,
    command: str = "train",
    plan: Mapping[str, Any] | None = None,
) -> Path:
    """Make the folder `run.out`, or open the run that is in it. Returns its path.

    All processes call it, and process 0 writes. The plan of a new run is kept when it resumes.

    Args:
        recipe: a Recipe, or another dataclass with a section `run` that has `out` and `resume`.
        read: reads such a recipe from the file in the folder.
        command: that makes the run, for the file's first line.
        plan: what a new run is expected to need, for plan.json.

    Raises:
        ValueError: if the folder has a run of another recipe, or files that are not a run.
    """
    out = Path(recipe.run.out)
    saved = out / "recipe.yaml"
    if saved.exists():
        changes = differences(read(saved), recipe)
        if changes:
            longer = any(change.startswith("optim.steps ") for change in changes)
            raise ValueError(
                f"run.out={out} has a run of another recipe: {'; '.join(changes)}. Choose another run.out, "
                f"or give the old values to resume that run."
                + (f" To train on: {out}/recipe.yaml weights={out} out=ANOTHER." if longer else "")
            )
    elif out.exists() and any(not path.match(TEMPORARY) and path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"run.out={out} is not empty and is not a run. Choose another run.out.")
    gather_objects(None)  # all processes have checked before anything is written
    if rank() == 0:
        write_text(saved, f"# dinokit {command} {saved}\n{to_yaml(recipe)}")
        if recipe.run.resume == "never":
            remove(out / "checkpoints")
            remove(out / ONCE)
        (out / "checkpoints").mkdir(exist_ok=True)
        for folder in (out, out / "checkpoints", out / "teachers"):
            for temporary in folder.glob(TEMPORARY):
                remove(temporary)  # left by a process that was killed while it wrote
        write_text(out / "env.json", json.dumps(environment(), indent=1))
        if plan is not None and not (out / "plan.json").exists():
            write_text(out / "plan.json", json.dumps(plan, indent=1))
    gather_objects(None)
    return out


def with_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with run.precision resolved: that of the run in the folder, or the best of process 0."""
    saved, name = Path(recipe.run.out) / "recipe.yaml", recipe.run.precision
    if name == "auto" and saved.exists():
        name = load_recipe(saved, of_run=True).run.precision
    precision = broadcast(pick_precision(name, device))
    return replace(recipe, run=replace(recipe.run, precision=precision))


def save_teacher(recipe: Recipe, backbone: Backbone, steps: int) -> None:
    """Write the teacher after `steps` steps; also to teachers/, every `run.keep_every` steps."""
    from dinokit.weights.formats.native import save_backbone

    path, every = Path(recipe.run.out) / "teacher.safetensors", recipe.run.keep_every
    save_backbone(path, backbone, recipe.architecture, to_yaml(recipe))
    if every and steps % every == 0:
        with atomic(path.parent / "teachers" / f"step_{steps:07d}.safetensors") as temporary:
            shutil.copyfile(path, temporary)


def run_facts(recipe: Recipe, source: ImageSource) -> dict[str, Any]:
    """What must be equal in every process, with names for people."""
    return {
        "version of dinokit": version("dinokit"),
        "version of torch": torch.__version__,
        "recipe": digest({**asdict(recipe), "data": None}),
        "kind of device": pick_device(recipe.run.device).type,
        **image_facts(source),
    }


def image_facts(source: ImageSource) -> dict[str, Any]:
    """Facts about the images that must also stay the same when a run resumes."""
    n = len(source)
    names = [source.name(i * n // NAMES) for i in range(min(NAMES, n))]
    return {
        "number of images": n,
        "order of images": f"{digest(names)} (the first is {names[0] if names else 'none'})",
    }


def image_fingerprint(source: ImageSource) -> dict[str, Any]:
    """image_facts() with names, sizes and times of all images up to STATED, and the contents of a few.

    Of more images an even sample counts. A source without files has names only.
    """
    n = len(source)
    chosen = [i * n // min(n, STATED) for i in range(min(n, STATED))]
    sizes, times = image_states(source, chosen)
    contents = digest([content_hash(source, i) for i in chosen[:: max(1, len(chosen) // CONTENTS)]])
    facts = {"names": digest([source.name(i) for i in chosen]), "sizes": digest(sizes), "contents": contents}
    return {
        **image_facts(source),
        **{f"{key} of images": x for key, x in facts.items()},
        TIMES: digest(times),
    }


def changed_images(
    recipe: Recipe, images: Mapping[str, Any], before: Mapping[str, Any], place: Path
) -> list[str]:
    """Names of the facts about images that changed since a checkpoint, if a run may resume with them.

    Args:
        recipe: of the run.
        images: image_fingerprint() now.
        before: the same at the checkpoint.
        place: of the checkpoint.

    Raises:
        ValueError: if a run must not resume with these images.
    """
    changed = [name for name, value in before.items() if value != images[name]]
    if set(changed) - {TIMES} and recipe.run.images == "same":
        name = changed[0]
        raise ValueError(
            f"The {name} was {before[name]} at {place}, and now is {images[name]}: a run resumes "
            f"with the images that it began with. Bring them back, accept these with run.images=changed, "
            f"or begin a new run with run.out=ANOTHER backbone.weights={recipe.run.out}/teacher.safetensors."
        )
    return changed


def differences(old: Any, new: Any) -> list[str]:
    """Each setting that differs and changes what is learnt, as 'key was A, now B'."""
    a, b = _flat(asdict(old)), _flat(asdict(new))
    return [
        f"{key} was {a.get(key, 'absent')}, now {b.get(key, 'absent')}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key) and key != "name" and not key.startswith(FREE)
    ]


def environment() -> dict[str, Any]:
    """Machine, software and command of a run, for env.json."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processes": world_size(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _commit() -> str | None:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None  # installed: a repository around the environment is not ours
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        flat.update(_flat(value, path) if isinstance(value, dict) and value else {path: _plain(value)})
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
