"""dinokit scaling RECIPE [key=value ...]: measure the speed of several processes against that of one.

Trains the same steps in three ways, in turns, so that other work on the machine slows all of them equally:

- one process on one core;
- processes=N of them that work together, each on a core of its own;
- as many independent processes, each with its share of the batch: the most that this machine allows.

No files are left. The last line is JSON: images/s of each way (`one`, `several`, `apart`), the median over
the steps after the first three; `ratio` and `ceiling`, how many times as fast as one process they are
together and apart; `reached`, ratio over ceiling.

dinokit scaling scenes_cpu
dinokit scaling scenes_cpu processes=2 batch=32 precision=fp32
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinokit import evaluation
from dinokit.commands import RECIPE_KEYS, Command, FailedError, full_key, key_lines
from dinokit.config import registry
from dinokit.config.load import checked_values, load_recipe, parse_overrides
from dinokit.config.registry import check_at_least
from dinokit.train.schedule import accumulation

RENAMED = {"--processes": "processes", "--steps": "steps", "--rounds": "rounds"}
words = registry.recipe_names
WARM_UP = 3  # steps
OWN = ("processes", "steps", "rounds")
SHORT = {key: RECIPE_KEYS[key] for key in ("weights", "batch", "precision", "seed")}
FIXED = (  # of every training here
    "evals=null", "optim.warmup=0", "run.device=cpu", "run.workers=0", "run.log_every=1",
    "run.checkpoint_every=1_000_000_000", "run.report=false",
)  # fmt: skip


@dataclass
class Config:
    processes: int = 2
    steps: int = 15  # of each training
    rounds: int = 2  # trainings of each kind

    def __post_init__(self) -> None:
        check_at_least(self, processes=2, steps=5, rounds=1)


def run(command: Command) -> dict[str, Any]:
    name = command.one_word("recipe", registry.recipe_names())
    own = [text for text in command.settings if text.partition("=")[0] in OWN]
    given = [text for text in command.settings if text not in own]
    cfg = Config(**checked_values(Config, parse_overrides(own)))
    world, steps, rounds = cfg.processes, cfg.steps, cfg.rounds
    settings = [*given, *FIXED, f"optim.steps={steps}"]
    fixed = {text.partition("=")[0] for text in (*FIXED, "optim.steps=", "run.out=")}
    for text in given:
        key = full_key(text).partition("=")[0]
        if key in fixed or key.partition(".")[0] in fixed:
            raise ValueError(f"{text}: scaling sets {key} itself. Leave it out; steps=N is for the steps.")
    recipe = load_recipe(name, settings, evaluation.architecture)
    accumulation(recipe, world)
    if not hasattr(os, "sched_setaffinity"):  # macOS has none
        raise ValueError(
            f"scaling gives each process a core of its own, and Python on {sys.platform} cannot do that. "
            "Run it on Linux."
        )
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < world:
        raise ValueError(
            f"processes={world}, but this machine has {len(cores)} cores: each process needs one."
        )
    words, share = [name, *settings], f"optim.batch={recipe.optim.batch // world}"
    rates: dict[str, list[float]] = {"one": [], "apart": [], "several": []}
    for _ in range(rounds):
        rates["one"] += _train(words, cores[:1])
        rates["apart"] += _train([*words, share], cores[:world], apart=True)
        rates["several"] += _train(words, cores[:world])
    one, apart, several = (statistics.median(values) for values in rates.values())
    ratio, ceiling, reached = several / one, apart / one, several / apart
    for label, rate, comment in (
        ("1 process", one, ""),
        (f"{world} processes, apart", apart, f", {ceiling:.2f} times as many: the ceiling"),
        (f"{world} together", several, f", {ratio:.2f} times as many: {reached:.1%} of the ceiling"),
    ):
        print(f"{label:<20} {rate:8.2f} images/s{comment}")
    medians = {"one": one, "apart": apart, "several": several}
    ratios = {"ratio": ratio, "ceiling": ceiling, "reached": reached}
    result = {"recipe": name, "processes": world, **medians, **ratios}
    command.show(result)
    return result


def describe(words: Sequence[str]) -> str:
    recipes = f"recipes: {', '.join(registry.recipe_names())}"
    return "\n".join([recipes, "keys, besides those of the recipe:", *key_lines("commands", "scaling")])


def _train(words: Sequence[str], cores: Sequence[int], apart: bool = False) -> list[float]:
    """Train with a process on each core, together or apart; images/s of each step after the warm-up."""
    variables: list[list[str]] = [[]] * len(cores) if apart else _torchrun_variables(len(cores))
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / (f"run{number}" if apart else "run") for number in range(len(cores))]
        processes = []
        for core, environment, out in zip(cores, variables, outs, strict=True):
            train = [sys.executable, "-m", "dinokit", "train", *words, f"run.out={out}"]
            process = subprocess.Popen(
                ["env", "OMP_NUM_THREADS=1", *environment, *train],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            os.sched_setaffinity(process.pid, {core})
            processes.append(process)
        errors = [process.communicate()[1] for process in processes]
        if any(process.returncode for process in processes):
            status = max(process.returncode for process in processes)
            raise FailedError(f"A training failed: {' '.join(''.join(errors).split())}", status)
        return speeds(list(dict.fromkeys(outs)))


def _torchrun_variables(world: int) -> list[list[str]]:
    """The environment that torchrun would give to each process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    sizes = [f"WORLD_SIZE={world}", f"LOCAL_WORLD_SIZE={world}"]
    shared = [*sizes, "MASTER_ADDR=localhost", f"MASTER_PORT={port}"]
    return [[f"RANK={rank}", f"LOCAL_RANK={rank}", *shared] for rank in range(world)]


def speeds(runs: Sequence[Path]) -> list[float]:
    """Images/s of each step after the warm-up, summed over runs that ran side by side."""
    texts = [(run / "metrics.jsonl").read_text(encoding="utf-8") for run in runs]
    each = [[json.loads(line)["images_per_second"] for line in text.splitlines()] for text in texts]
    return [sum(step) for step in zip(*each, strict=True)][WARM_UP:]
