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
behind FILE are added to `set`; out= replaces `out`. At the end, and with --table at any time, `out` gets
table.md, table.csv, runs.json, curves.svg and curves.png: the accuracy against the images seen and minutes.

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
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit import evaluation
from dinokit.commands import RECIPE_KEYS, Command, FailedError, full_key
from dinokit.commands._sweep_table import Point, Result, markdown, plot, table_of
from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe, read_mapping
from dinokit.config.values import validated
from dinokit.results import lower_is_better
from dinokit.runtime.files import printable, write_text

if TYPE_CHECKING:
    from rich.console import Console

RESUMES = True
SHORT = {key: full for key, full in RECIPE_KEYS.items() if key != "out"}  # `out` is the sweep's own folder
FLAGS = {
    "--table": "make the table and the plot of the runs that are there, and train nothing",
    "--slurm=": "submit the unfinished runs as an array of jobs, with this profile (docs/slurm.md)",
    "--dry-run": "print the commands, or with --slurm the batch script, and run nothing",
}
POLL = 0.5  # seconds between two looks at a run


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


def run(command: Command) -> dict[str, Any]:
    path = Path(command.one_word("file", sorted(str(p) for p in Path().glob("*sweep*.yaml"))))
    if not path.is_file():
        raise ValueError(f"There is no file {path}. dinokit sweep --help shows what it holds.")
    sweep = Config(**validated(Config, read_mapping(path, "sweep", Config), ""))
    outs = [text for text in command.settings if text.startswith("out=")]
    sweep.set += [text for text in command.settings if text not in outs]
    out = Path("".join(outs[-1:]).removeprefix("out=") or sweep.out or f"runs/{path.stem}")
    runs = plan(sweep, out)
    if "--table" in command.flags:
        return report(sweep, out, runs)
    for each in runs:
        _refuse_another_recipe(each)
        _refuse_another_metric(sweep.metric, each)
    remaining = [each for each in runs if not is_finished(each)]
    if "--slurm" in command.flags:
        return _submit(remaining, path.stem, command)
    if "--dry-run" in command.flags:
        commands = [" ".join(["dinokit", *each.words]) for each in remaining]
        print("\n".join(commands))
        return {"commands": commands}
    failed = _train_all(runs, remaining)
    if not failed:
        return report(sweep, out, runs)
    with suppress(OSError, ValueError):  # as without a score, or on a full disk: the failed runs say why
        report(sweep, out, runs)
    raise FailedError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")


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
            if not name.strip("."):
                raise ValueError(f"Row '{row}' has no letter or digit, and its name is that of a folder.")
            if owners.setdefault(name, row) != row:
                raise ValueError(f"Rows '{row}', '{owners[name]}' would share the folder {name}: rename one.")
            given = [full_key(text, SHORT) for text in (*sweep.set, *settings)]
            given += [] if seed is None else [f"run.seed={seed}"]
            if placed := [text for text in given if text.startswith(("out=", "run.out="))]:
                raise ValueError(f"{placed[0]}: a sweep chooses the folder of each run; its own is `out`.")
            given.append(f"run.out={out / name}")
            try:
                recipe = load_recipe(sweep.recipe, given, evaluation.architecture)
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
    return "  finished: " in _text(each.out / "run.log")[-2000:]


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


def _refuse_another_metric(metric: str, each: Run) -> None:
    """Refuse a score of an evaluator that the recipe does not have, before hours of training."""
    evaluator, have = metric.partition("/")[0] if "/" in metric else "", [*each.recipe.evals, "health"]
    if evaluator and evaluator not in have:
        raise ValueError(
            f"metric={metric}: row '{each.row}' has no evals.{evaluator}.{registry.suggest(evaluator, have)} "
            f"There is: {', '.join(have)}."
        )


def _train_all(runs: Sequence[Run], remaining: Sequence[Run]) -> list[str]:
    """Train runs one after another. Returns the rows that failed, each with its last line of output."""
    from rich.console import Console

    from dinokit.runtime.signals import Stopped

    console, failed = Console(highlight=False, soft_wrap=True), []
    if done := len(runs) - len(remaining):
        console.print(f"{done} of {len(runs)} runs are finished already")
    for number, each in enumerate(remaining, done + 1):
        console.print(f"run {number} of {len(runs)}: {each.out}", markup=False)
        log = each.out.with_name(f"{each.out.name}.log")
        status = _train(each, log, console)
        if status == 130:
            raise Stopped
        if status:
            last = _error(log) or f"status {status}"
            failed.append(f"{each.row} ({last}; see {log})")
            console.print(f"  failed: {printable(last)}", markup=False)
    return failed


def _train(each: Run, log: Path, console: "Console") -> int:
    """Train a run in a child process, which gets stop signals too. Returns its exit status, or 130."""
    from dinokit.runtime.signals import end_with_parent, stop_signals

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, stop_signals() as stop, console.status("starts") as line:
        # In a session of its own: Ctrl-C reaches it once, from here, and it saves before it ends.
        child = subprocess.Popen(
            [sys.executable, "-m", "dinokit", *each.words], stdout=file, stderr=file,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
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


def _error(log: Path) -> str:
    """The last line of a log that is an error's; else the last."""
    lines = _text(log).strip().splitlines()
    return next(
        (line for line in reversed(lines) if line.startswith("dinokit: ")), lines[-1] if lines else ""
    )


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _last_line(log: Path) -> str:
    steps = re.findall(r"(step \d+/\d+).*?(left [\d:]+)", _text(log)[-2000:])
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


def choose_metric(runs: Sequence[Run]) -> str:
    """The metric where Config.metric is empty: of several the one that most runs have; without any, ''."""
    found = Counter({key: n for key, n in _scores(runs).items() if not key.startswith("health/")})
    knn = Counter({key: count for key, count in found.items() if key.startswith("knn/top1@")})
    return next((key for key, _ in (knn or found).most_common(1)), "")


def _scores(runs: Sequence[Run]) -> Counter[str]:
    """The scores in the records of runs, with the number of runs that have each."""
    from dinokit.runtime.log import read_records

    found: Counter[str] = Counter()
    for each in runs:
        keys = [key for record in read_records(each.out) for key in record if "/" in key]
        found.update([*dict.fromkeys(keys)])
    return found


def read_result(each: Run, metric: str) -> Result:
    """What a run has come to, from its metrics.jsonl.

    Args:
        each: the run.
        metric: a key of metrics.jsonl.
    """
    from dinokit.runtime.log import read_records

    records, batch = read_records(each.out), each.recipe.optim.batch
    curve, minutes, last, verdict = [], 0.0, 0, ""
    for record in records:
        speed = record.get("images_per_second")
        if isinstance(speed, int | float) and speed > 0:
            minutes += (record["step"] - last) * batch / speed / 60
            last, verdict = record["step"], ""
        if isinstance(record.get(metric), int | float):
            curve.append(Point(record["step"] * batch, minutes, record[metric]))
        verdict = str(record.get("verdict", verdict))
    state = "finished" if is_finished(each) else "unfinished" if each.out.exists() else "not begun"
    return Result(each.row, each.seed, str(each.out), state, curve, verdict)


def report(sweep: Config, out: Path, runs: Sequence[Run]) -> dict[str, Any]:
    """Write the table and the plot of what is there, and print the table.

    Raises:
        ValueError: if no run has a score yet.
    """
    metric = sweep.metric or choose_metric(runs)
    results = [read_result(each, metric) for each in runs]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row, []).append(result)
    if not any(result.curve for result in results):
        have = sorted(_scores(runs))
        there = f"{registry.suggest(metric, have)} There is: {', '.join(have)}."
        raise ValueError(
            f"No run in {out} has a score of {metric or 'an evaluator'} yet."
            f"{there if have else ' Does the recipe have `evals`?'}"
        )
    table = table_of(groups, less_is_better=lower_is_better(metric.rpartition("/")[2]))
    write_text(out / "table.md", markdown(table))
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "runs.json", json.dumps([asdict(result) for result in results], indent=1))
    plot({line["row"]: groups[line["row"]] for line in table}, metric, out)
    print(f"{markdown(table)}\nthe score is {metric}")
    print(f"written to {out}: table.md, table.csv, runs.json, curves.svg, curves.png")
    return {"out": out, "table": table}
