"""A run's folder as a report reads it: recipe, environment, plan and records."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dinokit import viz
from dinokit.config.load import Recipe, load_recipe
from dinokit.runtime.log import read_records


@dataclass
class Run:
    """A run's folder, as it was read."""

    folder: Path
    recipe: Recipe
    text: str  # recipe.yaml
    env: dict[str, Any]
    plan: dict[str, Any]  # plan.json
    records: list[dict[str, Any]]  # of metrics.jsonl
    colour: str

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def steps(self) -> int:
        """Steps that were recorded."""
        return max((int(record["step"]) for record in self.records), default=0)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a key of the records; one step has its last value."""
        found = {r["step"]: r[key] for r in self.records if isinstance(r.get(key), int | float)}
        return list(found), list(found.values())

    def seconds(self) -> float:
        """Seconds of all steps together, without evaluations; 0: not known."""
        steps, speeds = self.curve("images_per_second")
        lengths = (end - begin for begin, end in pairwise([0, *steps]))
        known = (n / speed for n, speed in zip(lengths, speeds, strict=True) if speed > 0)
        return self.recipe.optim.batch * sum(known)


def read_run(folder: Path, number: int = 0) -> Run:
    """The recipe and the records in a run's folder.

    Raises:
        LookupError: if there is no recipe.yaml in it.
        ValueError: if that is damaged, or names modules of packages that the user has not named.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise LookupError(f"{folder} is not a run: it has no recipe.yaml. dinokit train makes runs.")
    records = read_records(folder)
    text = file.read_text(encoding="utf-8", errors="replace")
    env, plan = (_json(folder / name) for name in ("env.json", "plan.json"))
    recipe = load_recipe(file, of_run=True)
    return Run(folder, recipe, text, env, plan, records, viz.LINES[number % len(viz.LINES)])


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or it is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def keys_of(runs: Sequence[Run]) -> list[str]:
    """The names of all numbers in the records, in the order met."""
    keys = {k: 0 for run in runs for r in run.records for k, v in r.items() if isinstance(v, int | float)}
    return [key for key in keys if key != "step" and "/images_" not in key]
