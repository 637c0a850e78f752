"""dinokit results DIR...: print results of evaluators as tables over runs and checkpoints, best first.

Every results.jsonl in these folders and below is read; the best of each column is bold. Every
metrics.jsonl is read too, for evaluations during training: at the last step of a run and at its best.

dinokit results runs
dinokit results runs/photos runs/try --json
"""

import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dinokit import results
from dinokit.commands import Command
from dinokit.runtime.files import printable

if TYPE_CHECKING:
    from rich.console import Console

LEAST = 16  # characters of a line for names of weights, and for settings, beside many scores


def run(command: Command) -> dict[str, Any]:
    if command.settings:
        raise ValueError(f"dinokit results takes folders, not '{command.settings[0]}'.")
    folders = command.words or ["runs"]
    trained = results.training_tables(folders)
    lines, broken = results.read(folders, needed=not trained)
    for where in broken:
        print(f"dinokit: skipped, as it is not a result: {where}", file=sys.stderr)
    tables = results.tables(lines) + trained
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe has no width: names are whole, unless COLUMNS is set
        console.width = shutil.get_terminal_size((10_000, 24)).columns
    for table in tables:
        _show(console, table)
    return {"tables": [asdict(table) for table in tables]}


def _show(console: "Console", table: results.Table) -> None:
    from rich.table import Table

    shown = Table(title=_plain(table.title), title_justify="left")
    with_settings = any(settings for _, settings, _ in table.rows)
    shown.add_column("weights", overflow="fold", min_width=LEAST)
    if with_settings:
        shown.add_column("settings", overflow="fold", min_width=LEAST)
    cells = [
        [_cell(v, best) for v, best in zip(values, table.best, strict=True)] for _, _, values in table.rows
    ]
    for number, column in enumerate(table.columns):
        longest = max(len(_number(values[number])) for _, _, values in table.rows)
        shown.add_column(
            _plain(column), justify="right", overflow="fold", min_width=max(longest, min(len(column), 8))
        )
    for (weights, settings, _), scores in zip(table.rows, cells, strict=True):
        shown.add_row(_plain(weights), *([_plain(settings)] if with_settings else []), *scores)
    wide = console.options.update(max_width=10_000)
    least = console.measure(shown, options=wide).minimum
    console.print(shown, width=max(console.width, least), crop=False)  # a score is never cut short


def _plain(text: str) -> str:
    """A text out of a file, for a table: without control characters, and with [ ] as they stand."""
    from rich.markup import escape

    return escape(printable(text))


def _cell(value: float | None, best: float | None) -> str:
    text = _number(value)
    return f"[bold]{text}[/bold]" if text and value == best else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
