"""dinokit scaling RECIPE [key=value ...]: how much faster several processes train on this machine than one.

Trains the same steps with one process on one core and with --processes of them, each on a core of its own,
in turns, so that a busy machine disturbs both alike. Nothing stays on disk. The last line is JSON: images/s
of both, the median over the steps behind the first three, and their ratio.

dinokit scaling scenes_cpu --processes 2 optim.batch=32
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dinokit import shelves
from dinokit.config import load_recipe
from dinokit.verbs import Command

FLAGS = {
    "--processes=": "how many, 2 if not given",
    "--steps=": "of each training, 15 if not given",
    "--rounds=": "trainings of each kind, 2 if not given",
}
WARM_UP = 3  # steps


def run(command: Command) -> None:
    name = command.one_word("recipe", shelves.recipe_names())
    world, steps, rounds = (
        _whole(command.flags, flag, least)
        for flag, least in (("--processes", 2), ("--steps", 5), ("--rounds", 1))
    )
    settings = [
        *command.settings, "evals=null", f"optim.steps={steps}", "optim.warmup=0", "run.device=cpu",
        "run.workers=0", "run.log_every=1", "run.checkpoint_every=1_000_000_000",
    ]  # fmt: skip
    load_recipe(name, settings)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < world:
        raise ValueError(f"--processes={world}, but there are {len(cores)} cores here: each takes one.")
    speeds: dict[int, list[float]] = {1: [], world: []}
    for _ in range(rounds):
        for count, found in speeds.items():
            found += _train([name, *settings], cores[:count])
    one, many = (statistics.median(found) for found in speeds.values())
    print(f"{1:>4} process    {one:8.2f} images/s\n{world:>4} processes  {many:8.2f} images/s")
    print(json.dumps({"recipe": name, "processes": world, "one": one, "several": many, "ratio": many / one}))


def describe(words: Sequence[str]) -> str:
    return f"recipes: {', '.join(shelves.recipe_names())}"


def _whole(flags: dict[str, str], flag: str, least: int) -> int:
    default = {"--processes": "2", "--steps": "15", "--rounds": "2"}[flag]
    text = flags.get(flag, default)
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{flag}={text}: it must be a whole number, {least} or more.")
    return int(text)


def _train(words: Sequence[str], cores: Sequence[int]) -> list[float]:
    """Images a second of each step but the first, by one process a core."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, core in enumerate(cores):
            launch = [
                f"RANK={rank}", f"WORLD_SIZE={len(cores)}", f"LOCAL_RANK={rank}",
                f"LOCAL_WORLD_SIZE={len(cores)}", "MASTER_ADDR=localhost", f"MASTER_PORT={port}",
            ]  # fmt: skip
            given = ["env", "OMP_NUM_THREADS=1", *(launch if len(cores) > 1 else [])]
            train = [sys.executable, "-m", "dinokit", "train", *words, f"run.out={folder}/run"]
            process = subprocess.Popen(
                [*given, *train], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            os.sched_setaffinity(process.pid, {core})
            processes.append(process)
        said = [process.communicate()[1] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"A training failed: {' '.join(''.join(said).split())}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["images_per_second"] for line in lines][WARM_UP:]
