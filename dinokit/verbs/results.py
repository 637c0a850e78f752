"""dinokit results DIR...: what evaluators found, as tables over runs and checkpoints, best first.

Every results.jsonl in these folders and below is read; the best of each column is bold. So is every
metrics.jsonl, for what the evaluators said while a run was trained: at its last step and at its best.

dinokit results runs
dinokit results runs/photos runs/try --json
"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from dinokit import results, results_training
from dinokit.verbs import Command

if TYPE_CHECKING:
    from rich.console import Console

FLAGS = {"--json": "print each table as a JSON object on a line of its own"}


def run(command: Command) -> None:
    if command.settings:
        raise ValueError(f"dinokit results takes folders, and not '{command.settings[0]}'.")
    folders = command.words or ["runs"]
    trained = results_training.tables(folders)
    lines, broken = results.read(folders, needed=not trained)
    for where in broken:
        print(f"dinokit: passed over what is no result: {where}", file=sys.stderr)
    tables = results.tables(lines) + trained
    if "--json" in command.flags:
        for table in tables:
            print(json.dumps(asdict(table)))
        return
    from rich.console import Console

    console = Console()
    for table in tables:
        _show(console, table)


def _show(console: "Console", table: results.Table) -> None:
    from rich.table import Table

    shown = Table(title=table.title, title_justify="left")
    told = any(settings for _, settings, _ in table.rows)
    shown.add_column("weights", overflow="fold")
    if told:
        shown.add_column("settings", overflow="fold")
    for column in table.columns:
        shown.add_column(column, justify="right")
    for weights, settings, values in table.rows:
        cells = [_cell(value, best) for value, best in zip(values, table.best, strict=True)]
        shown.add_row(weights, *([settings] if told else []), *cells)
    console.print(shown)


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}"
    return f"[bold]{text}[/bold]" if value == best else text
