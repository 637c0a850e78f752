"""A run's folder: recipe.yaml, env.json, metrics.jsonl, run.log, checkpoints/, teacher.safetensors.

It belongs to one recipe. Given again with the same recipe, the run goes on; with another, that is an error.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dinokit.config.load import Recipe, load_recipe, to_yaml
from dinokit.models import Backbone
from dinokit.runtime.device import pick_precision
from dinokit.runtime.distributed import broadcast, gather_objects, rank, world_size
from dinokit.runtime.files import TEMPORARY, atomic, remove, write_text
from dinokit.runtime.run_lock import LOCK
from dinokit.weights import save_backbone

# Settings that may change when a run goes on, because they do not change what it learns.
FREE = (
    "evals", "backbone.fingerprint", "run.out", "run.device", "run.workers", "run.log_every",
    "run.checkpoint_every", "run.keep", "run.keep_every", "run.max_unreadable", "run.parallel",
    "run.timeout_minutes", "run.attention", "run.compile", "run.checkpointing", "run.logits", "run.tokens",
    "run.keep_memory", "data.memory_gib",
)  # fmt: skip
PACKAGES = ("dinokit", "torch", "torchvision", "timm", "numpy", "pillow", "omegaconf", "safetensors")


def open_run(recipe: Recipe) -> Path:
    """Make the folder `run.out`, or take up the run that is in it. Returns its path.

    All processes call it, and process 0 writes.

    Raises:
        ValueError: if the folder holds a run of another recipe, or things that are no run.
    """
    out = Path(recipe.run.out)
    saved = out / "recipe.yaml"
    if saved.exists():
        changes = differences(load_recipe(saved), recipe)
        if changes:
            raise ValueError(
                f"run.out={out} holds a run of another recipe: {'; '.join(changes)}. Choose another run.out, "
                f"or give the old values to go on with that run."
            )
    elif out.exists() and any(not path.match(TEMPORARY) and path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"run.out={out} is not empty and holds no run. Choose another run.out.")
    gather_objects(None)  # all have looked before anything is written
    if rank() == 0:
        write_text(saved, f"# dinokit train {saved}\n{to_yaml(recipe)}")
        (out / "checkpoints").mkdir(exist_ok=True)
        for part in (
            *out.glob(TEMPORARY),
            *out.glob(f"checkpoints/{TEMPORARY}"),
            *out.glob(f"teachers/{TEMPORARY}"),
        ):
            remove(part)  # left by a process that was killed while it wrote
        write_text(out / "env.json", json.dumps(environment(), indent=1))
    gather_objects(None)
    return out


def with_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """With run.precision settled: what the run in the folder has, else what process 0's device does well."""
    saved, wanted = Path(recipe.run.out) / "recipe.yaml", recipe.run.precision
    if wanted == "auto" and saved.exists():
        wanted = load_recipe(saved).run.precision
    precision = broadcast(pick_precision(wanted, device))
    return replace(recipe, run=replace(recipe.run, precision=precision))


def save_teacher(recipe: Recipe, backbone: Backbone, done: int) -> None:
    """Write the teacher after `done` steps; to teachers/ as well, if it is one of every so many to keep."""
    path, every = Path(recipe.run.out) / "teacher.safetensors", recipe.run.keep_every
    save_backbone(path, backbone, recipe.architecture, to_yaml(recipe))
    if every and done % every == 0:
        with atomic(path.parent / "teachers" / f"step_{done:07d}.safetensors") as part:
            shutil.copyfile(path, part)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Each setting that differs and matters for what is learnt, as 'key was A, now B'."""
    a, b = _flat(asdict(old)), _flat(asdict(new))
    return [
        f"{key} was {a.get(key, 'absent')}, now {b.get(key, 'absent')}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key) and key != "name" and not key.startswith(FREE)
    ]


def environment() -> dict[str, Any]:
    """Where and with what a run runs."""
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
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None  # installed: a repository around the environment is not ours
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    done: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        done.update(_flat(value, path) if isinstance(value, dict) and value else {path: _plain(value)})
    return done


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
