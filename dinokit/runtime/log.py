"""Log of a run: console (a progress bar on a terminal, else lines), run.log and metrics.jsonl."""

import json
import math
import sys
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.text import Text

from dinokit.runtime.distributed import rank
from dinokit.runtime.files import fits, json_record, open_own, printable, read_regular, write_text
from dinokit.runtime.signals import Stopped, should_stop
from dinokit.runtime.trackers import Trackers

T = TypeVar("T")

BARS = "▁▂▃▄▅▆▇█"
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
CURVE = 12  # scores shown of a curve, the last ones


class RunLog:
    """The log of a run in folder `out`; only process 0 writes. Use it in a `with` block.

    Args:
        out: the run's folder.
        steps: of the whole run.
        start: steps already done; records of later steps, from an interrupted run, are dropped.
        trackers: names of TRACKERS, which get the records too.
        settings: of the run, for the trackers.
        label: before every line on the console, where several runs write to one.
    """

    def __init__(
        self,
        out: Path,
        steps: int,
        start: int,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        label: str = "",
    ) -> None:
        self.main, self.label = rank() == 0, f"{label}: " if label else ""
        self.evaluated: set[str] = set()  # evaluators with results after step `start`
        self.has_verdict = False  # whether that step has a verdict
        self.console = Console(quiet=not self.main, highlight=False, soft_wrap=True)
        self.live = self.main and not label and sys.stdout.isatty()
        self.steps, self.begun, self.start = steps, time.monotonic(), start
        if self.main:
            self.metrics_path = out / "metrics.jsonl"
            overwrites = not start and self.metrics_path.exists() and self.metrics_path.stat().st_size
            records = _drop_later_records(self.metrics_path, start)
            keys = {key for record in records for key in record}
            self.evaluated = {key.split("/")[0] for key in keys if "/" in key}
            self.has_verdict = "verdict" in keys
            self.text_path = out / "run.log"
            self.text = open_own(self.text_path, "a")
            if overwrites:
                self.info(
                    f"begins at step 0: the records of a run without a checkpoint in {out} are overwritten"
                )
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}{task.fields[score]}"),
        )
        self.task = self.progress.add_task("train", total=steps, completed=start, speed="", score="")
        # Below the bar, where they can take several lines without pushing the bar out of the window.
        self.values = Text(no_wrap=False, overflow="fold")
        self.view = self._view()
        self.trackers = Trackers(trackers, out, settings or {}, start, self.info)

    def __enter__(self) -> "RunLog":
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.stop()
        self.trackers.end()
        if self.main:
            forgiven = [OSError] if error else []  # on a full disk the first error is the one to report
            with suppress(*forgiven):
                if isinstance(error, Exception):
                    self._write("".join(traceback.format_exception(error)))
                    error.add_note(f"The traceback is in {self.text_path}.")
            with suppress(*forgiven):
                self.text.close()

    def _view(self) -> Live:
        return Live(Group(self.progress, self.values), console=self.console, transient=True)

    def _show(self) -> None:
        if self.live:
            self.view = self._view()  # a stopped one would first erase its old lines
            self.view.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the progress bar during the block, so that another one can be shown."""
        self.view.stop()
        try:
            yield
        finally:
            self._show()

    def info(self, text: str) -> None:
        """Write a line of text to the console and to run.log."""
        if self.main:
            text = printable(text)
            self.console.print(self.label + text, markup=False)
            self._write(text)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values after `step` steps to metrics.jsonl; the progress bar shows a k-NN accuracy."""
        accuracy = next((value for name, value in values.items() if name.startswith("knn/top1@")), None)
        if accuracy is not None:
            self.progress.update(self.task, score=f"  k-NN {accuracy:.3f}")
        if self.main:
            with fits(self.metrics_path), open_own(self.metrics_path, "a") as file:
                file.write(json.dumps({"step": step, **{k: _json(v) for k, v in values.items()}}) + "\n")
            self.trackers.scalars(step, values)

    def scores(self, step: int, name: str, scores: Mapping[str, float], seconds: float) -> None:
        """Record the scores of evaluator `name` after `step` steps; show them and their curve."""
        values = {f"{name}/{key}": value for key, value in scores.items()}
        self.record(step, values)
        text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
        self.info(f"{name} after step {step}: {text}  ({seconds:.1f} s)")
        if not self.main or name == "health":  # signals have no better and worse
            return
        first = next(iter(values))
        past = [
            record[first]
            for record in read_records(self.metrics_path.parent)
            if record.get(first) is not None
        ]
        if len(past) > 1:
            bars = sparkline(past[-CURVE:]) + "  " if self.console.encoding.startswith("utf") else ""
            self.info(f"{first} so far: {bars}{' '.join(f'{value:.3g}' for value in past[-CURVE:])}")

    def step(self, step: int, values: Mapping[str, float], shown: Container[str] | None = None) -> None:
        """Record the values after `step` steps, and show them with the remaining time.

        Args:
            step: steps that are done.
            values: by name.
            shown: the names for the console; None: all. run.log has all.
        """
        self.record(step, values)
        if not self.main:
            return
        texts = {name: f"{name} {short(value)}" for name, value in values.items()}
        left = (time.monotonic() - self.begun) / max(step - self.start, 1) * (self.steps - step)
        first, last = f"step {step}/{self.steps}", f"left {clock(left)}"
        self._write("  ".join([first, *texts.values(), last]))
        chosen = [text for name, text in texts.items() if shown is None or name in shown]
        if self.live:
            speed = f"{values['images_per_second']:.0f} images/s" if "images_per_second" in values else ""
            self.progress.update(self.task, completed=step, speed=speed)
            self.values.plain = "  ".join(chosen)
        else:
            self.console.print(self.label + "  ".join([first, *chosen, last]), markup=False)

    def _write(self, text: str) -> None:
        with fits(self.text_path):
            self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self.text.flush()


def read_records(out: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; a line that is none, as after a kill, is left out."""
    path = out / "metrics.jsonl"
    text = read_regular(path).decode("utf-8", "replace") if path.exists() else ""
    records = filter(None, map(json_record, text.splitlines()))
    return [record for record in records if type(record.get("step")) is int]


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line of text: a bar for each finite value, from 0 or a lower least to the largest."""
    low, high = min([0.0, *values]), max([0.0, *values])
    return "".join(BARS[round((len(BARS) - 1) * (v - low) / max(high - low, 1e-12))] for v in values)


def first_and_last_scores(out: Path) -> list[str]:
    """Lines of a table with the first and last score of each evaluator in a run; empty without evaluators."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for record in read_records(out):
        scores = {k: v for k, v in record.items() if "/" in k and v is not None and "/images_" not in k}
        first = {**scores, **first}
        last.update(scores)
    width = max(map(len, first), default=0)
    rows = [f"{name:<{width}}  {first[name]:>9.4f}  {last[name]:>9.4f}" for name in first]
    return [f"{'':<{width}}  {'at first':>9}  {'at last':>9}", *rows] if rows else []


def watch(items: Iterable[T], total: int, text: str, done: int = 0, together: bool = False) -> Iterator[T]:
    """Iterate over items with a progress bar on standard error; a line every half minute in a pipe or file.

    All processes call it, each with its own items. Inside stop_signals(between_items=True) a stop signal ends
    it with Stopped in all processes: after the current item in a process that received it, after their last
    item in the others.

    Args:
        items: the remaining items.
        total: number of items, with those done before.
        text: beside the bar.
        done: number of items done before.
        together: whether the processes wait for each other at every item; then all stop after the same item.

    Raises:
        Stopped: if a process received a stop signal.
    """
    console = Console(stderr=True)
    hidden = rank() > 0 or not console.is_terminal
    printed = begun = time.monotonic()
    shown = track(items, text, total, done, console=console, disable=hidden, transient=True)
    for number, item in enumerate(shown, done + 1):
        yield item
        now = time.monotonic()
        if hidden and now - printed > LINE_EVERY and number < total:
            left = (now - begun) / (number - done) * (total - number)
            info(f"{text}: {number} of {total}, left {clock(left)}")
            printed = now
        if should_stop(together):
            break
    if should_stop(together=True):
        raise Stopped


def info(text: str) -> None:
    """Print a line on standard error, in process 0 only."""
    if rank() == 0:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"dinokit: {printable(text)}", markup=False)


def _json(value: Any) -> Any:
    """JSON has no infinity: an overflow of fp16 is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_later_records(path: Path, start: int) -> list[dict[str, Any]]:
    """Drop records of steps after `start`, or all if start is 0. Returns the records of `start`."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if start else []
    wrong = [number for number, line in enumerate(lines[:-1], 1) if _step_of(line) == float("inf")]
    if wrong:  # the last line may be cut short, by a kill
        raise ValueError(
            f"{path}, line {wrong[0]}, is no record of a run: the file is damaged. Repair it, or move it "
            f"away, and the run resumes without its old records."
        )
    lines = [line for line in lines if _step_of(line) <= start]
    write_text(path, "".join(line + "\n" for line in lines))
    return [json_record(line) or {} for line in lines if _step_of(line) == start]


def _step_of(line: str) -> float:
    step = (json_record(line) or {}).get("step")
    return step if type(step) is int else math.inf  # cut short when the run was killed


def short(value: object) -> str:
    """A number for people: four digits of what is not whole, and no exponent where it is large."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
