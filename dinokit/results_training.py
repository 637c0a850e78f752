"""What evaluators said of runs while these were trained, from their metrics.jsonl, as tables.

A record of metrics.jsonl has `step`, and `EVALUATOR/SCORE` for what was judged after that step.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dinokit.config.load import read_mapping
from dinokit.results import Table, best, rank

METRICS = "metrics.jsonl"


def tables(folders: Iterable[str | Path]) -> list[Table]:
    """One for each evaluator and data, with the last step of each run and its best, by the first score.

    Folders without such a file give none, and a line that was cut short is passed over.
    """
    groups: dict[str, list[tuple[str, str, dict[str, float]]]] = {}
    for folder in filter(Path.is_dir, map(Path, folders)):
        for file in sorted(folder.rglob(METRICS)):
            for name, records in _by_evaluator(file).items():
                title = f"{name} on {_data(file.parent, name)}, while training"
                groups.setdefault(title, []).extend(_rows(str(file.parent), records))
    return [_table(title, rows) for title, rows in sorted(groups.items())]


def _by_evaluator(file: Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Steps and scores of each evaluator."""
    done: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(text)
        except ValueError:
            continue
        found: dict[str, dict[str, float]] = {}
        for key, value in record.items():
            name, slash, score = key.partition("/")
            if slash and not score.startswith("images_") and isinstance(value, int | float):
                found.setdefault(name, {})[score] = value
        for name, scores in found.items():
            done.setdefault(name, []).append((record["step"], scores))
    return done


def _rows(run: str, records: list[tuple[int, dict[str, float]]]) -> list[tuple[str, str, dict[str, float]]]:
    first = next(iter(records[-1][1]))
    shown = dict([min(records, key=lambda record: rank(first, record[1].get(first))), records[-1]])
    return [(run, f"step={step}", scores) for step, scores in shown.items()]


def _data(run: Path, name: str) -> str:
    """On what an evaluator judged: its own test images, or those of the run."""
    if not (run / "recipe.yaml").is_file():
        return "unknown data"
    recipe: dict[str, Any] = read_mapping(run / "recipe.yaml")
    section = ((recipe.get("evals") or {}).get(name) or {}).get("test") or recipe.get("data") or {}
    return str(section.get("path") or section.get("name", "nothing"))


def _table(title: str, rows: list[tuple[str, str, dict[str, float]]]) -> Table:
    columns = list(dict.fromkeys(score for _, _, scores in rows for score in scores))
    of = {c: [scores[c] for _, _, scores in rows if c in scores] for c in columns}
    rows = sorted(rows, key=lambda row: rank(columns[0], row[2].get(columns[0])))
    shown = [(run, step, [scores.get(c) for c in columns]) for run, step, scores in rows]
    return Table(title, columns, shown, [best(c, of[c]) for c in columns])
