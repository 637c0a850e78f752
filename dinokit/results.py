"""results.jsonl: what evaluators found, one JSON line each, and how it was found.

A line has `eval`, `weights`, then the scores by name, and `about`: fingerprint, recipe (that trained the
weights), data (the evaluator's sources), settings, transform, seed, software, device, seconds, time. Lines
are only ever added. Of lines about the same thing the last one counts.
"""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAME = "results.jsonl"
PACKAGES = ("dinokit", "torch", "torchvision", "numpy", "pillow")
MACHINE = ("batch", "cache", "out", "save_every", "workers")  # settings that decide no score
SET = ("channels", "target")  # keys of a source that the evaluator sets, whatever stands there
KEPT = "eval", "weights", "about", "file"  # keys of a line that are no scores
LOWER = ("abs_rel", "sq_rel", "rmse", "log10", "log_10", "silog")  # scores of which less is better
PLAIN = "queries", "blocks", "pool", "lr", "C", "held_out"  # what tells, but is no score


def record(
    name: str,
    weights: str,
    scores: Mapping[str, float],
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The line of one evaluation.

    Args:
        name: of the evaluator.
        weights: what was judged.
        scores: by name.
        settings: of the evaluator, its sources among them.
        about: whatever else is known.
    """
    sources = {
        role: {key: value for key, value in section.items() if key not in SET}
        for role, section in settings.items()
        if isinstance(section, dict) and "name" in section
    }
    rest = {key: value for key, value in settings.items() if key not in (*sources, *MACHINE)}
    software = {package: _version(package) for package in PACKAGES}
    return {
        "eval": name,
        "weights": weights,
        **scores,
        "about": {
            **about,
            "data": sources,
            "settings": rest,
            "seed": settings.get("seed", 0),
            "software": {"python": platform.python_version(), **software},
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    }


def append(folder: str | Path, line: Mapping[str, Any]) -> Path:
    """Add a line to the results in a folder, which is made. Returns the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line) + "\n"
        with path.open("a+b") as file:  # in one write at the end: two commands may add at the same time
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text  # after a line that was cut short
            file.write(text.encode())
    except OSError as error:
        raise OSError(f"The result could not be added to {path}: {error}. Set out=ANOTHER_FOLDER.") from None
    return path


def read(folders: Iterable[str | Path], needed: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """All lines of the results in some folders and below them, oldest first.

    Returns:
        The lines, each with `file`; and where there was one that is no result, for a person.

    Raises:
        LookupError: if there is no such folder, or, if they are `needed`, no result in any of them.
    """
    lines, broken = [], []
    for folder in map(Path, folders):
        if not folder.exists():
            raise LookupError(f"There is no folder {folder} (looked from {Path.cwd()}).")
        for file in sorted(folder.rglob(NAME)) if folder.is_dir() else [folder]:
            for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                line = _line(text)
                if line is None:
                    broken.append(f"{file}, line {number}")
                else:
                    lines.append({**line, "file": str(file)})
    if not lines and needed:
        where = ", ".join(map(str, folders))
        raise LookupError(f"There is no {NAME} in {where} or below. dinokit eval makes it.")
    return sorted(lines, key=_moment), broken


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(line, dict) and {"eval", "weights", "about"} <= set(line)
    return line if whole and isinstance(line["about"], dict) else None


def _moment(line: Mapping[str, Any]) -> datetime:
    """When it was found; without a word of that, before all others."""
    try:
        moment = datetime.fromisoformat(str(line["about"].get("time", "")))
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclass
class Table:
    """What one evaluator found on one set of images."""

    title: str
    columns: list[str]  # names of scores
    rows: list[
        tuple[str, str, list[float | None]]
    ]  # weights, settings in which rows differ, a value a column
    best: list[float | None]  # of each column


def tables(lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The lines as tables, one for each evaluator and data it was run on; best rows first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["eval"], _data_of(line)), []).append(line)
    return [_table(f"{name} on {data}", group) for (name, data), group in sorted(groups.items())]


def _table(title: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    newest = {(line["weights"], _fingerprint_of(line), _settings(line)): line for line in lines}
    kept = list(newest.values())
    columns = list(dict.fromkeys(key for line in kept for key in line if _is_score(key, line[key])))
    settings = [dict(_settings(line)) for line in kept]
    keys = dict.fromkeys(key for row in settings for key in row)
    differ = [key for key in keys if len({row.get(key) for row in settings}) > 1]
    rows = [
        (
            _weights_of(line, kept),
            " ".join(f"{key}={row[key]}" for key in differ if key in row),
            [line.get(column) for column in columns],
        )
        for line, row in zip(kept, settings, strict=True)
    ]
    highest = [best(column, [line[column] for line in kept if column in line]) for column in columns]
    rows.sort(key=lambda row: [rank(column, value) for column, value in zip(columns, row[2], strict=True)])
    return Table(title, columns, rows, highest)


def lower_is_better(score: str) -> bool:
    """Whether less of a score is better: an error, and not a share that is right."""
    return score.split(maxsplit=1)[0].removesuffix("_optimistic").startswith(LOWER)


def best(column: str, values: Sequence[float]) -> float | None:
    """The best value of a score; None of none."""
    return (min if lower_is_better(column) else max)(values, default=None)


def rank(column: str, value: float | None) -> float:
    """What sorts values of a score: the best first, those that are not there last."""
    return math.inf if value is None else value if lower_is_better(column) else -value


def _is_score(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and key not in (*KEPT, *PLAIN) and not key.startswith("images_")


def _settings(line: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What tells rows of a table apart: the settings, and the sources key by key."""
    about = line["about"]
    done = dict(about.get("settings", {}))
    for role, section in about.get("data", {}).items():
        done |= {f"{role}.{key}": value for key, value in section.items() if key not in SET}
    return tuple((key, str(value)) for key, value in sorted(done.items()))


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
    """Of the weights; older lines call it weights_hash."""
    about = line["about"]
    return about.get("fingerprint") or about.get("weights_hash")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
