"""Results of evaluators: results.jsonl, one JSON line an evaluation, and tables over runs and checkpoints.

A line has `eval`, `weights`, then the scores by name, and `about`: fingerprint, recipe (that trained the
weights), data (the evaluator's sources), settings, transform, seed, software, device, seconds, time. Lines
are only ever added; of lines of the same weights and settings the last one counts.

metrics.jsonl of a training run has lines with `step`, and `EVALUATOR/SCORE` of evaluations at that step.
"""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dinokit.config import registry
from dinokit.config.load import read_mapping, unresolved
from dinokit.runtime.files import DiskFullError, fits, json_record, read_regular

NAME, METRICS = "results.jsonl", "metrics.jsonl"
PACKAGES = ("dinokit", "torch", "torchvision", "numpy", "pillow")
MACHINE = ("batch", "cache", "out", "overlap", "save_every", "workers")  # settings that do not change a score
SET = ("channels", "target")  # keys of a source that the evaluator sets, whatever their value
NOT_SCORES = "eval", "weights", "about", "file"  # keys of a line
# Beginnings of scores of which less is better.
LOWER = ("abs_rel", "sq_rel", "rmse", "log10", "log_10", "silog", "NoC", "failed", "quality", "other")
COUNTS = (
    "images",
    "objects",
    "queries",
    "classes",
    "blocks",
    "clips",
    "steps",
)  # beginnings of scores that are numbers of things
PLAIN = "queries", "blocks", "pool", "lr", "C", "held_out", "steps"  # numbers that inform, but do not rank


def record(
    name: str,
    weights: str,
    scores: Mapping[str, float],
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The line of one evaluation by evaluator `name`, whose settings include its sources."""
    sources = {
        role: {key: value for key, value in section.items() if key not in SET}
        for role, section in settings.items()
        if isinstance(section, dict) and "name" in section
    }
    unused: list[str] = []
    with suppress(LookupError):  # an evaluator that is not here
        unused = [
            item.name
            for item in fields(registry.read_config("eval", name))
            if not registry.is_used(item, settings)
        ]
    rest = {key: value for key, value in settings.items() if key not in (*sources, *MACHINE, *unused)}
    software = {package: _version(package) for package in PACKAGES}
    return {
        "eval": name,
        "weights": weights,
        **{key: _count_or_score(key, value) for key, value in scores.items()},
        "about": {
            **about,
            "data": unresolved(sources),
            "settings": unresolved(rest),
            "seed": settings.get("seed", 0),
            "software": {"python": platform.python_version(), **software},
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    }


def _count_or_score(key: str, value: float) -> float:
    """A number of things is an integer; evaluators return all numbers as they come."""
    return int(value) if key.startswith(COUNTS) and float(value).is_integer() else value


def append(folder: str | Path, line: Mapping[str, Any]) -> Path:
    """Add a line to the results in a folder, which is made. Returns the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line) + "\n"
        # In one write at the end: two commands may add at the same time.
        with fits(path), path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text  # after a line that was cut short
            file.write(text.encode())
    except OSError as error:
        why = error.fact if isinstance(error, DiskFullError) else error
        scores = json.dumps({key: value for key, value in line.items() if key not in NOT_SCORES})
        raise OSError(
            f"The result could not be added to {path}: {why}. Set out=ANOTHER_FOLDER. It is: {scores}"
        ) from None
    return path


def read(folders: Iterable[str | Path], needed: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """All lines of the results in some folders and below them, oldest first.

    Lines of a file stay in its order, also if the clock was set back between them; files are merged by time.

    Returns:
        The lines, each with `file`; and the places of lines that are not results, as text.

    Raises:
        LookupError: if a folder does not exist, or if results are `needed` and there is none.
    """
    lines: list[tuple[datetime, dict[str, Any]]] = []
    broken = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise LookupError(f"There is no folder {folder} (looked from {Path.cwd()}).")
        for file in sorted(folder.rglob(NAME)) if folder.is_dir() else [folder]:
            latest = datetime.min.replace(tzinfo=UTC)
            for number, text in enumerate(read_regular(file).decode("utf-8", "replace").splitlines(), 1):
                line = _line(text)
                if line is None:
                    broken.append(f"{file}, line {number}")
                else:
                    latest = max(latest, _moment(line))
                    lines.append((latest, {**line, "file": str(file)}))
    if not lines and needed:
        where = ", ".join(map(str, folders))
        raise LookupError(f"There is no {NAME} in {where} or below. dinokit eval makes it.")
    return [line for _, line in sorted(lines, key=lambda each: each[0])], broken


def _line(text: str) -> dict[str, Any] | None:
    line = json_record(text)
    if line is None or not isinstance(line.get("about"), dict):
        return None
    sections = [line["about"].get(key, {}) for key in ("settings", "data")]
    sections += sections[1].values() if isinstance(sections[1], dict) else []
    mappings = all(isinstance(each, dict) for each in sections)
    return line if mappings and all(isinstance(line.get(key), str) for key in ("eval", "weights")) else None


def _moment(line: Mapping[str, Any]) -> datetime:
    """When it was evaluated, as the line says; long ago without a time."""
    try:
        moment = datetime.fromisoformat(str(line["about"].get("time", "")))
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclass
class Table:
    """Scores of one evaluator on one data set."""

    title: str
    columns: list[str]  # names of scores
    rows: list[tuple[str, str, list[float | None]]]  # weights, settings that differ, a value a column
    best: list[float | None]  # of each column


def tables(lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The lines as tables, one for each evaluator and data it was run on; best rows first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["eval"], _data_of(line)), []).append(line)
    return [_table(f"{name} on {data}", group) for (name, data), group in sorted(groups.items())]


def _table(title: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    newest = {(line["weights"], _fingerprint_of(line), _settings(line)): line for line in lines}
    latest = list(newest.values())
    columns = list(dict.fromkeys(key for line in latest for key in line if _is_score(key, line[key])))
    settings = [dict(_settings(line)) for line in latest]
    keys = dict.fromkeys(key for row in settings for key in row)
    differ = [key for key in keys if len({row.get(key) for row in settings}) > 1]
    rows = [
        (
            _weights_of(line, latest),
            " ".join(f"{key}={row[key]}" for key in differ if key in row),
            {column: line[column] for column in columns if column in line},
        )
        for line, row in zip(latest, settings, strict=True)
    ]
    return _sorted_table(title, columns, rows)


def _sorted_table(
    title: str, columns: list[str], rows: list[tuple[str, str, dict[str, float]]], order_by: int | None = None
) -> Table:
    """Rows of weights, settings and scores, best first by `order_by` columns; scores that flatter last."""
    columns = sorted(columns, key=lambda column: column.endswith("_optimistic"))
    rows = sorted(rows, key=lambda row: [sort_key(c, row[2].get(c)) for c in columns[:order_by]])
    highest = [best(column, [row[2][column] for row in rows if column in row[2]]) for column in columns]
    cells = [(weights, settings, [scores.get(c) for c in columns]) for weights, settings, scores in rows]
    return Table(title, columns, cells, highest)


def training_tables(folders: Iterable[str | Path]) -> list[Table]:
    """Tables from metrics.jsonl, one for each evaluator and data set: the last and the best step of each run.

    The best step is that of the first score. Truncated lines are skipped.
    """
    groups: dict[str, list[tuple[str, str, dict[str, float]]]] = {}
    for folder in filter(Path.is_dir, map(Path, folders)):
        for file in sorted(folder.rglob(METRICS)):
            for name, records in _by_evaluator(file).items():
                title = f"{name} on {_data_of_run(file.parent, name)}, while training"
                groups.setdefault(title, []).extend(_rows(str(file.parent), records))
    tables = []
    for title, rows in sorted(groups.items()):
        columns = list(dict.fromkeys(score for _, _, scores in rows for score in scores))
        tables.append(_sorted_table(title, columns, rows, 1))
    return tables


def _by_evaluator(file: Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Steps and scores of each evaluator."""
    result: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for text in read_regular(file).decode("utf-8", "replace").splitlines():
        record = json_record(text) or {}
        step = record.get("step")
        if type(step) is not int:
            continue
        by_name: dict[str, dict[str, float]] = {}
        for key, value in record.items():
            name, slash, score = key.partition("/")
            if slash and not score.startswith("images_") and isinstance(value, int | float):
                by_name.setdefault(name, {})[score] = value
        for name, scores in by_name.items():
            result.setdefault(name, []).append((step, scores))
    return result


def _rows(run: str, records: list[tuple[int, dict[str, float]]]) -> list[tuple[str, str, dict[str, float]]]:
    first = next(iter(records[-1][1]))
    shown = dict([min(records, key=lambda record: sort_key(first, record[1].get(first))), records[-1]])
    return [(run, f"step={step}", scores) for step, scores in shown.items()]


def _data_of_run(run: Path, name: str) -> str:
    """The data of an evaluator inside a run: its own test images, or those of the run."""
    if not (run / "recipe.yaml").is_file():
        return "unknown data"
    recipe: Any = read_mapping(run / "recipe.yaml")
    try:
        section = ((recipe.get("evals") or {}).get(name) or {}).get("test") or recipe.get("data") or {}
        return str(section.get("path") or section.get("name", "nothing"))
    except AttributeError:
        raise ValueError(f"{run / 'recipe.yaml'} is damaged: its evals or data are no sections.") from None


def lower_is_better(score: str) -> bool:
    """Whether a lower score is better: an error, and not an accuracy."""
    return next(iter(score.split()), "").removesuffix("_optimistic").startswith(LOWER)


def best(column: str, values: Sequence[float]) -> float | None:
    """The best value of a score; None if there are no values."""
    return (min if lower_is_better(column) else max)(values, default=None)


def sort_key(column: str, value: float | None) -> float:
    """Sorts values of a score: the best first, missing ones last."""
    return math.inf if value is None else value if lower_is_better(column) else -value


def _is_score(key: str, value: Any) -> bool:
    counts = key.startswith(("images_", "objects_", "clips_"))
    return isinstance(value, int | float) and key not in (*NOT_SCORES, *PLAIN) and not counts


def _settings(line: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What distinguishes rows of a table: the settings, and the sources key by key."""
    about = line["about"]
    settings = dict(about.get("settings", {}))
    for role, section in about.get("data", {}).items():
        settings |= {f"{role}.{key}": value for key, value in section.items() if key not in SET}
    return tuple((key, str(value)) for key, value in sorted(settings.items()))


def _data_of(line: Mapping[str, Any]) -> str:
    data = line["about"].get("data", {})
    section: dict[str, Any] = data.get("test") or next(iter(data.values()), {})
    split = f" {section['split']}" if section.get("split", "all") != "all" else ""
    return f"{section.get('path') or section.get('name', 'nothing')}{split}"


def _weights_of(line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The name, with the start of the fingerprint if several weights have the same name."""
    fingerprints = {_fingerprint_of(other) for other in lines if other["weights"] == line["weights"]}
    tag = f" [{str(_fingerprint_of(line))[:6]}]" if len(fingerprints) > 1 else ""
    return f"{line['weights']}{tag}"


def _fingerprint_of(line: Mapping[str, Any]) -> str | None:
    """The fingerprint of the weights; older lines call it weights_hash."""
    about = line["about"]
    return about.get("fingerprint") or about.get("weights_hash")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
