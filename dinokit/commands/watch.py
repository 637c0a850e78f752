"""dinokit watch RUN [RUN ...]: show how far runs are that other processes train; Ctrl-C leaves them alone.

On a terminal the bars move until all runs have ended; elsewhere a line for each run is printed once.

dinokit watch runs/photos
dinokit watch runs/lr/*
"""

import time
from pathlib import Path
from typing import Any

from dinokit.commands import Command
from dinokit.config.load import Recipe, load_recipe

PERIOD = 2.0  # seconds between two looks


def run(command: Command) -> dict[str, Any]:
    folders = [Path(word) for word in command.words if (Path(word) / "recipe.yaml").is_file()]
    if not folders or command.settings:
        asked = " ".join([*command.words, *command.settings]) or "nothing"
        raise ValueError(
            f"Give folders of runs, which have a recipe.yaml: dinokit watch runs/NAME, not {asked}."
        )
    recipes = {folder: load_recipe(folder / "recipe.yaml", of_run=True) for folder in folders}
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        for folder, recipe in recipes.items():
            step, text, _ = progress_of(folder, recipe)
            console.print(f"{folder}  {step / recipe.optim.steps:.0%}  {text}", markup=False)
        return _states(recipes)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks = {f: bars.add_task(str(f), total=r.optim.steps, text="") for f, r in recipes.items()}
        running = True
        while running:
            running = False
            for folder, recipe in recipes.items():
                step, text, ended = progress_of(folder, recipe)
                bars.update(tasks[folder], completed=step, text=text)
                running |= not ended
            time.sleep(PERIOD if running else 0)
    return _states(recipes)


def _states(recipes: dict[Path, Recipe]) -> dict[str, Any]:
    states = {folder: progress_of(folder, recipe) for folder, recipe in recipes.items()}
    runs = {
        str(folder): {"step": step, "steps": recipes[folder].optim.steps, "text": text, "ended": ended}
        for folder, (step, text, ended) in states.items()
    }
    return {"runs": runs}


def progress_of(out: Path, recipe: Recipe) -> tuple[int, str, bool]:
    """Steps that a run has done, a text with speed and accuracy, and whether it has ended.

    A run that was killed has not ended: its log does not say so.
    """
    from dinokit.runtime.log import clock, read_records

    records = read_records(out)
    steps = [record for record in records if "lr" in record]
    step, speed = (steps[-1]["step"], steps[-1].get("images_per_second")) if steps else (0, None)
    scores = [value for r in records for key, value in r.items() if key.startswith("knn/top1@")]
    log = out / "run.log"
    last = log.read_text(encoding="utf-8", errors="replace")[-500:].splitlines()[-1:] if log.exists() else []
    ended = bool(last) and any(mark in last[0] for mark in ("  finished: ", "  stopped after step "))
    parts = [f"{step}/{recipe.optim.steps}"]
    if ended:
        parts.append("finished" if "  finished: " in last[0] else "stopped")
    elif speed:
        left = (recipe.optim.steps - step) * recipe.optim.batch / speed
        parts += [f"left {clock(left)}", f"{speed:.0f} images/s"]
    return step, "  ".join([*parts, *([f"k-NN {scores[-1]:.3f}"] if scores else [])]), ended
