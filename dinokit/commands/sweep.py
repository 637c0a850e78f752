"""dinokit sweep FILE [key=value ...]: train variants of a recipe, and compare them in a table and a plot.

FILE is a YAML file:

    recipe: eurosat_dinov2_cpu          # a name in configs/, or a path
    set: [data.path=eurosat.parquet]    # for every run, as on the command line
    grid:                               # every combination ...
      optim.lr: [5e-4, 1e-3]
      optim.batch: [32, 64]
    rows:                               # ... or named rows instead of a grid
      base: []
      wide: [backbone.width=256, backbone.heads=4]
    seeds: [0, 1]                       # optional: every row with each run.seed
    out: runs/lr                        # optional: the folder, by default runs/NAME-OF-FILE
    metric: knn/top1@20                 # optional: a key of metrics.jsonl

The runs are made one after another, each by `dinokit train` into a folder of its own below `out`, with its
output in a .log beside it. The same command skips finished runs and resumes an interrupted one. Settings
behind FILE are added to `set`. At the end, and with --table at any time, `out` gets table.md, table.csv,
runs.json, curves.svg and curves.png: the accuracy against the images seen and against minutes of training.

dinokit sweep sweep.yaml
dinokit sweep sweep.yaml --slurm gpu
"""

import csv
import io
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, FailedError
from dinokit.config.load import Recipe, load_recipe, read_mapping
from dinokit.config.values import validated
from dinokit.results import lower_is_better

if TYPE_CHECKING:
    from rich.console import Console

RESUMES = True
FLAGS = {
    "--table": "make the table and the plot of the runs that are there, and train nothing",
    "--slurm=": "submit the unfinished runs as an array of jobs, with this profile (docs/slurm.md)",
    "--dry-run": "print the commands, or with --slurm the batch script, and run nothing",
}
POLL = 0.5  # seconds between two looks at a run
EARLIER = 3  # columns of the table before the last score
LINES = "-", "--", ":", "-."  # of curves, after the ten colours


@dataclass
class Config:
    """The keys of a sweep."""

    recipe: str = "???"
    set: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    out: str = ""
    metric: str = ""  # empty: k-NN accuracy with the first k, else the first score of the first evaluator


@dataclass
class Run:
    """A run of a sweep."""

    row: str
    seed: int | None  # None: the recipe's
    out: Path
    words: list[str]  # behind `dinokit`
    recipe: Recipe


@dataclass
class Point:
    """A score of a run."""

    images: int  # seen so far
    minutes: float  # of training so far, without evaluations
    score: float


@dataclass
class Result:
    """What a run has come to."""

    row: str
    seed: int | None
    out: str
    state: str  # finished, unfinished, not begun
    curve: list[Point]
    verdict: str  # what is wrong with it, by train/health.py


def run(command: Command) -> dict[str, Any]:
    path = Path(command.one_word("file", sorted(str(p) for p in Path().glob("*sweep*.yaml"))))
    if not path.is_file():
        raise ValueError(f"There is no file {path}. dinokit sweep --help shows what it holds.")
    sweep = Config(**validated(Config, read_mapping(path, "sweep", Config), ""))
    sweep.set += command.settings
    out = Path(sweep.out or f"runs/{path.stem}")
    runs = plan(sweep, out)
    if "--table" in command.flags:
        return report(sweep, out, runs)
    for each in runs:
        _refuse_another_recipe(each)
    remaining = [each for each in runs if not is_finished(each)]
    if "--slurm" in command.flags:
        return _submit(remaining, path.stem, command)
    if "--dry-run" in command.flags:
        commands = [" ".join(["dinokit", *each.words]) for each in remaining]
        print("\n".join(commands))
        return {"commands": commands}
    failed = _train_all(runs, remaining)
    result = report(sweep, out, runs)
    if failed:
        raise FailedError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    return result


def plan(sweep: Config, out: Path) -> list[Run]:
    """The runs of a sweep, every row with the first seed first. Settings are checked.

    Raises:
        ValueError, LookupError: if `grid` and `rows` are both given, or a row does not fit its recipe.
    """
    if sweep.grid and sweep.rows:
        raise ValueError("grid and rows are both given: write the combinations as rows, or leave one out.")
    rows = sweep.rows or _combinations(sweep.grid)
    runs, owners = [], dict[str, str]()
    seeds: list[int | None] = [*sweep.seeds] or [None]
    for seed in seeds:
        for row, settings in rows.items():
            name = re.sub(r"[^\w.+-]+", "-", row).strip("-") + ("" if seed is None else f"-seed{seed}")
            if owners.setdefault(name, row) != row:
                raise ValueError(
                    f"Rows '{row}' and '{owners[name]}' would share the folder {name}: rename one."
                )
            given = [
                *sweep.set,
                *settings,
                *([] if seed is None else [f"run.seed={seed}"]),
                f"run.out={out / name}",
            ]
            try:
                recipe = load_recipe(sweep.recipe, given)
            except (ValueError, LookupError) as error:
                raise type(error)(f"row '{row}': {error.args[0]}") from None
            runs.append(Run(row, seed, out / name, ["train", sweep.recipe, *given], recipe))
    return runs


def _combinations(grid: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """The settings of every combination of a grid, by a label: {'lr=0.1 batch=32': [...]}."""
    ends = [key.rpartition(".")[2] for key in grid]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(grid, ends, strict=True)}
    rows = {}
    for values in itertools.product(*grid.values()):
        texts = {key: json.dumps(value) for key, value in zip(grid, values, strict=True)}  # JSON is YAML
        label = " ".join(f"{short[key]}={text.strip(chr(34))}" for key, text in texts.items())
        rows[label or "base"] = [f"{key}={text}" for key, text in texts.items()]
    return rows


def is_finished(each: Run) -> bool:
    """Whether a run has done all its steps and its last evaluation."""
    log = each.out / "run.log"
    return log.exists() and "  finished: " in log.read_text(encoding="utf-8", errors="replace")[-2000:]


def _refuse_another_recipe(each: Run) -> None:
    """Refuse a row whose folder has a run with other settings, which the file had before."""
    saved = each.out / "recipe.yaml"
    if not saved.exists():
        return
    from dinokit.train.run_dir import differences

    old, new = load_recipe(saved), each.recipe
    if new.run.precision == "auto":
        new = replace(new, run=replace(new.run, precision=old.run.precision))
    changes = differences(old, new)
    if changes:
        raise ValueError(
            f"row '{each.row}': {each.out} has a run with other settings: {'; '.join(changes)}. Give the "
            f"sweep another `out`, or rename the row, or delete that folder."
        )


def _train_all(runs: Sequence[Run], remaining: Sequence[Run]) -> list[str]:
    """Train runs one after another. Returns the rows that failed, each with its last line of output."""
    from rich.console import Console

    from dinokit.runtime.signals import Stopped

    console, failed = Console(highlight=False, soft_wrap=True), []
    if len(remaining) < len(runs):
        console.print(f"{len(runs) - len(remaining)} of {len(runs)} runs are finished already")
    for number, each in enumerate(remaining, len(runs) - len(remaining) + 1):
        console.print(f"run {number} of {len(runs)}: {each.out}", markup=False)
        log = each.out.with_name(f"{each.out.name}.log")
        status = _train(each, log, console)
        if status == 130:
            raise Stopped
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [
                f"status {status}"
            ]
            failed.append(f"{each.row} ({lines[-1]}; see {log})")
            console.print(f"  failed: {lines[-1]}", markup=False)
    return failed


def _train(each: Run, log: Path, console: "Console") -> int:
    """Train a run in a child process, which gets stop signals too. Returns its exit status, or 130."""
    from dinokit.runtime.signals import stop_signals

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, stop_signals() as stop, console.status("starts") as line:
        # In a session of its own: Ctrl-C reaches it once, from here, and it saves before it ends.
        child = subprocess.Popen(
            [sys.executable, "-m", "dinokit", *each.words], stdout=file, stderr=file, start_new_session=True
        )
        try:
            while child.poll() is None:
                if stop.received:
                    child.send_signal(stop.received[0])
                    child.wait()
                    return 130
                line.update(_last_line(each.out / "run.log"))
                time.sleep(POLL)
        finally:
            if child.poll() is None:
                child.kill()  # at the second Ctrl-C
                child.wait()
    return child.returncode


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
    steps = re.findall(r"(step \d+/\d+).*?(left [\d:]+)", text)
    return "  ".join(steps[-1]) if steps else "starts"


def _submit(remaining: Sequence[Run], title: str, command: Command) -> dict[str, Any]:
    from dinokit.commands.submit import submit_commands
    from dinokit.slurm.profile import load_profile

    if not remaining:
        print("Every run is finished already: dinokit sweep FILE --table makes the table.")
        return {"jobs": []}
    name, dry = command.flags["--slurm"], "--dry-run" in command.flags
    if not dry:
        print("When the jobs have ended: dinokit sweep FILE --table")
    commands, given = [each.words for each in remaining], [f"profile={name}"]
    return submit_commands(f"sweep-{title}", commands, load_profile(name, {}), given, dry_run=dry)


def read_result(each: Run, metric: str) -> Result:
    """What a run has come to, from its metrics.jsonl.

    Args:
        each: the run.
        metric: as Config.metric.
    """
    from dinokit.runtime.log import read_records

    records, batch = read_records(each.out), each.recipe.optim.batch
    scores = [key for record in records for key in record if "/" in key and not key.startswith("health/")]
    knn = [key for key in scores if key.startswith("knn/top1@")]
    metric = metric or next(iter([*knn, *scores]), "")
    curve, minutes, last, verdict = [], 0.0, 0, ""
    for record in records:
        if record.get("images_per_second"):
            minutes += (record["step"] - last) * batch / record["images_per_second"] / 60
            last, verdict = record["step"], ""
        if record.get(metric) is not None:
            curve.append(Point(record["step"] * batch, minutes, record[metric]))
        verdict = record.get("verdict", verdict)
    state = "finished" if is_finished(each) else "unfinished" if each.out.exists() else "not begun"
    return Result(each.row, each.seed, str(each.out), state, curve, verdict)


def report(sweep: Config, out: Path, runs: Sequence[Run]) -> dict[str, Any]:
    """Write the table and the plot of what is there, and print the table.

    Raises:
        ValueError: if no run has a score yet.
    """
    from dinokit.runtime.files import write_text

    results = [read_result(each, sweep.metric) for each in runs]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row, []).append(result)
    if not any(result.curve for result in results):
        name = sweep.metric or "an evaluator"
        raise ValueError(f"No run in {out} has a score of {name} yet. Does the recipe have `evals`?")
    table = _table(groups, less_is_better=lower_is_better(sweep.metric.rpartition("/")[2] or "knn"))
    write_text(out / "table.md", _markdown(table))
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "runs.json", json.dumps([asdict(result) for result in results], indent=1))
    plot({line["row"]: groups[line["row"]] for line in table}, sweep.metric or "k-NN accuracy", out)
    print(f"{_markdown(table)}\nwritten to {out}: table.md, table.csv, runs.json, curves.svg, curves.png")
    return {"out": out, "table": table}


def score_at(curve: Sequence[Point], key: str, x: float) -> float | None:
    """The score at so many images or minutes, linear between two evaluations; None outside of the curve."""
    for a, b in itertools.pairwise(curve):
        left, right = getattr(a, key), getattr(b, key)
        if left <= x <= right:
            return a.score + (b.score - a.score) * ((x - left) / (right - left) if right > left else 1.0)
    return None


def _table(groups: Mapping[str, Sequence[Result]], less_is_better: bool) -> list[dict[str, str]]:
    """A line for each row, the best last score first; means over the finished seeds, if there are any."""
    scored = {}
    for row, group in groups.items():
        begun = [result for result in group if result.curve]
        scored[row] = [result for result in begun if result.state == "finished"] or begun
    ends = [result.curve[-1] for group in scored.values() for result in group]
    images, minutes = max(end.images for end in ends), min(end.minutes for end in ends)
    lines = []
    for row, group in groups.items():
        curves = [result.curve for result in scored[row]]
        last = [curve[-1].score for curve in curves]
        line = {"row": row, "runs": f"{sum(r.state == 'finished' for r in group)}/{len(group)}"}
        line |= {"score": _mean(last), "spread": f"{stdev(last):.3f}" if len(last) > 1 else ""}
        line["at first"] = _mean([curve[0].score for curve in curves])
        for x in sorted({round(images * part / (EARLIER + 1)) for part in range(1, EARLIER + 1)}):
            line[f"at {x:,} images"] = _mean([score_at(curve, "images", x) for curve in curves])
        line[f"at {minutes:.1f} min"] = _mean([score_at(curve, "minutes", minutes) for curve in curves])
        line["images"] = f"{fmean([c[-1].images for c in curves]):,.0f}" if curves else ""
        line["minutes"] = f"{fmean([c[-1].minutes for c in curves]):.1f}" if curves else ""
        line["verdict"] = ", ".join(dict.fromkeys(r.verdict for r in group if r.verdict))
        lines.append(line)
    sign = 1 if less_is_better else -1
    return sorted(lines, key=lambda line: sign * float(line["score"] or sign * inf))  # without a score: last


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3f}" if known else ""


def _markdown(table: Sequence[Mapping[str, str]]) -> str:
    rows = [list(table[0]), *(list(line.values()) for line in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def plot(groups: Mapping[str, Sequence[Result]], metric: str, out: Path) -> None:
    """Two plots side by side, as SVG and PNG: the score against images seen, and against minutes.

    Args:
        groups: the results of every row, in the order of the legend; a line is the mean over seeds, as far as
            all of them are, and the band is from the smallest to the largest.
        metric: the label.
        out: the folder.
    """
    from matplotlib.figure import Figure

    from dinokit.runtime.files import atomic

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (row, group) in enumerate(groups.items()):
        steps = list(zip(*(result.curve for result in group if result.curve), strict=False))
        scores = [[point.score for point in points] for points in steps]
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
        for axis, key in zip(axes, ("images", "minutes"), strict=True):
            x = [fmean(getattr(point, key) for point in points) for points in steps]
            axis.plot(x, [fmean(each) for each in scores], marker=".", label=row, **style)
            low, high = [min(each) for each in scores], [max(each) for each in scores]
            axis.fill_between(x, low, high, alpha=0.15, linewidth=0, color=style["color"])
    for axis, label in zip(axes, ("images seen", "minutes of training, without evaluations"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    for ending in ("svg", "png"):
        with atomic(out / f"curves.{ending}") as temporary:
            figure.savefig(temporary, format=ending, dpi=120)
