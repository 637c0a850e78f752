"""Writes one HTML page about runs: what they learnt, curves, results, pictures, recipe and system.

A page has no script and loads nothing. Its templates are in dinokit/templates; every text is escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dinokit import __version__, results, viz
from dinokit.report.outcome import plan_and_outcome, summary
from dinokit.report.pictures import Pictures
from dinokit.report.run import Run, keys_of, read_run
from dinokit.runtime.files import write_text
from dinokit.runtime.log import short

__all__ = ["NAME", "read_run", "render", "summary", "write_report"]

NAME = "report.html"
GUIDE = "guide_"  # before the names of losses that fresh heads of a frozen teacher learn by
RATES = ("lr", "weight_decay", "momentum", "teacher_temp")
SPEED = ("images_per_second", "data_wait", "memory_gib")
MEANINGS = {  # of signals, in short; docs/training.md says more
    "target_entropy": "of the teacher's targets, in nats; with kl it is the DINO loss",
    "kl": "what the student does not predict of the targets",
    "crop_agreement": "how much two crops of an image agree in the teacher's head: 0 to 1",
    "crop_agreement_needed": "what agrees less than this vanishes",
    "brightness_agreement": "how much the mean brightness of two crops agrees: 0 to 1",
    "head_spread": "near 0: all images have the same output of the head",
    "prototypes_used": "near 1: all images have the same prototype",
    "feature_rank": "directions in which class tokens vary; near 1: they have collapsed",
    "health/feature_rank": "directions in which class tokens vary; near 1: they have collapsed",
    "health/shuffled_patches": "share of features that shuffled patches change; below 0.01: no shapes",
    "health/brightness_share": "share of features that is brightness; near 1: little else is learnt",
    "health/common_share": "share of features that all images have in common; near 1: cosines are all alike",
}


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
        legend=[(run.name, run.colour) for run in runs],
        results=_results([run.folder for run in runs]),
        runs=[
            {
                "name": run.name,
                "folder": run.folder,
                "colour": run.colour,
                "text": run.text,
                "summary": summary(run),
                "plan": plan_and_outcome(run),
                "system": _system(run.env),
                "pictures": Pictures.of(run.folder, run.recipe, device),
            }
            for run in runs
        ],
    )
    write_text(path, page)
    return path


def _curves(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Titles of groups, and the charts of each: one for each number, with a line for each run."""
    losses = {name for run in runs for name in run.recipe.losses}
    groups: dict[str, list[str]] = {
        title: [] for title in ("Losses", "Evaluations", "Signals", "Rates", "Speed")
    }
    for key in keys_of(runs):
        evaluated = "/" in key and not key.startswith("health/")
        kinds = (
            key.removeprefix(GUIDE) in losses,
            evaluated,
            key not in RATES + SPEED,
            key in RATES,
            key in SPEED,
        )
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
    last = ", ".join(short(line.y[-1]) for line in lines)
    changes = "; ".join(f"from {short(line.y[0])} to {short(line.y[-1])}" for line in lines)
    return {
        "name": key,
        "note": f" {last}",
        "meaning": MEANINGS.get(key, ""),
        "alt": f"{key} over steps: {changes}",
        "svg": viz.line_chart(lines, marks),
    }


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
