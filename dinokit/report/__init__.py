"""Writes one HTML page about runs: what they learnt, curves, results, pictures, recipe and system.

A page has no script and loads nothing. Its templates are in dinokit/templates; every text is escaped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dinokit import __version__, results, viz
from dinokit.config.load import Recipe, load_recipe
from dinokit.report.pictures import Pictures
from dinokit.runtime.files import write_text
from dinokit.runtime.log import read_records

NAME = "report.html"
RISE = 0.02  # of an accuracy: more than the noise of 1,000 test images
RATES = ("lr", "weight_decay", "momentum", "teacher_temp")
SPEED = ("images_per_second", "data_wait", "memory_gib")


def render(template: str, **values: Any) -> str:
    """A page from a template in dinokit/templates. Names of files that are not UTF-8 have ? in them."""
    environment = Environment(
        loader=PackageLoader("dinokit", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    text = environment.get_template(template).render(**values)
    return text.encode("utf-8", "replace").decode("utf-8") + "\n"


@dataclass
class Run:
    """A run's folder, as it was read."""

    folder: Path
    recipe: Recipe
    text: str  # recipe.yaml
    env: dict[str, Any]
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


def write_report(folders: Sequence[str | Path], out: str | Path | None = None, device: str = "auto") -> Path:
    """Write a page about one or more runs. Returns its path, by default report.html in the first run.

    What cannot be shown, such as pictures of images that were moved, is named in the page with the reason.

    Args:
        folders: of runs, finished or not.
        out: the file to write.
        device: as run.device.

    Raises:
        LookupError, ValueError: if a folder is not a run.
        OSError: if the page cannot be written.
    """
    runs = [read_run(Path(folder), i) for i, folder in enumerate(folders)]
    path = Path(folders[0]) / NAME if out is None else Path(out)
    page = render(
        "run.html",
        title=f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs",
        version=__version__,
        curves=list(_curves(runs)),
        results=_results([run.folder for run in runs]),
        runs=[
            {
                "name": run.name,
                "folder": run.folder,
                "colour": run.colour,
                "text": run.text,
                "summary": summary(run),
                "system": _system(run.env),
                "pictures": Pictures.of(run.folder, run.recipe, device),
            }
            for run in runs
        ],
    )
    write_text(path, page)
    return path


def read_run(folder: Path, number: int = 0) -> Run:
    """The recipe and the records in a run's folder.

    Raises:
        LookupError: if there is no recipe.yaml in it.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise LookupError(f"{folder} is not a run: it has no recipe.yaml. dinokit train makes runs.")
    env: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    records = [record for record in read_records(folder) if "step" in record]
    text = file.read_text(encoding="utf-8", errors="replace")
    return Run(folder, load_recipe(file), text, env, records, viz.LINES[number % len(viz.LINES)])


@dataclass
class Summary:
    """What a run came to, in words."""

    headline: str
    kind: str  # good, bad or neither: ""
    sentences: list[str]


def summary(run: Run) -> Summary:
    """Progress, scores and verdicts of a run in sentences."""
    steps, batch = run.recipe.optim.steps, run.recipe.optim.batch
    _, speed = run.curve("images_per_second")
    sentences = [f"{run.steps:,} of {steps:,} steps, {run.steps * batch:,} images seen"]
    if speed:
        mean = len(speed) / sum(1 / max(s, 1e-9) for s in speed)
        sentences[0] += (
            f", {mean:,.0f} images per second, {run.steps * batch / mean / 60:,.1f} minutes of steps"
        )
    sentences[0] += "."
    if run.steps < steps:
        sentences.append(f"Not finished. To resume: dinokit train {run.folder}/recipe.yaml")
    scores = [key for key in _keys([run]) if "/" in key and not key.startswith("health/")]
    changes = {key: run.curve(key)[1] for key in scores}
    for key, values in changes.items():
        best = results.best(key.partition("/")[2], values)
        sentences.append(f"{key}: {values[0]:.4g} at first, {values[-1]:.4g} at last, best {best:.4g}.")
    verdicts = {r["step"]: r for r in run.records if isinstance(r.get("verdict"), str)}
    sentences += [
        f"Verdict after step {step}: {r['verdict']}: {r.get('advice', 'see run.log.')}"
        for step, r in verdicts.items()
    ]
    if not verdicts and "feature_rank" in _keys([run]):
        sentences.append("The checks of signals that ran found nothing wrong.")
    if run.steps in verdicts:
        return Summary(f"Something is wrong: {verdicts[run.steps]['verdict']}", "bad", sentences)
    first = next((values for key, values in changes.items() if key.startswith("knn/")), [])
    if len(first) > 1 and first[-1] > first[0] + RISE:
        return Summary("It learns: the k-NN accuracy rose.", "good", sentences)
    if len(first) > 1:
        return Summary("The k-NN accuracy did not rise.", "bad", sentences)
    return Summary("Trained without an evaluation." if not changes else "Trained.", "", sentences)


def _keys(runs: Sequence[Run]) -> list[str]:
    """The names of all numbers in the records, in the order met."""
    keys = {k: 0 for run in runs for r in run.records for k, v in r.items() if isinstance(v, int | float)}
    return [key for key in keys if key != "step" and "/images_" not in key]


def _curves(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Titles of groups, and the charts of each: one for each number, with a line for each run."""
    losses = {name for run in runs for name in run.recipe.losses}
    groups: dict[str, list[str]] = {
        title: [] for title in ("Losses", "Evaluations", "Signals", "Rates", "Speed")
    }
    for key in _keys(runs):
        evaluated = "/" in key and not key.startswith("health/")
        kinds = key in losses, evaluated, key not in RATES + SPEED, key in RATES, key in SPEED
        groups[list(groups)[kinds.index(True)]].append(key)
    marks = sorted(
        {
            end * run.recipe.optim.steps
            for run in runs
            for loss in run.recipe.losses.values()
            for end in (loss or {}).get("phase", ())
        }
        - {0.0, *(float(run.recipe.optim.steps) for run in runs)}
    )
    for title, keys in groups.items():
        if keys:
            yield title, [_chart(runs, key, marks) for key in keys]


def _chart(runs: Sequence[Run], key: str, marks: Sequence[float]) -> dict[str, str]:
    curves = [(run, *run.curve(key)) for run in runs]
    lines = [viz.Line(steps, values, run.colour) for run, steps, values in curves if steps]
    last = ", ".join(f"{line.y[-1]:.4g}" for line in lines)
    changes = "; ".join(f"from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
    return {"name": key, "note": f" {last}", "alt": f"{key} over steps: {changes}",
            "svg": viz.line_chart(lines, marks)}  # fmt: skip


def _results(folders: Sequence[Path]) -> list[results.Table]:
    lines, _ = results.read(folders, needed=False)
    return results.tables(lines) + results.training_tables(folders)


def _system(env: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in env.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {each}" for name, each in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value)) or "none"
        rows.append((key, str(value)))
    return rows
