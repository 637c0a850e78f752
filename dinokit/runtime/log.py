"""What a run says: a progress bar on a terminal and plain lines elsewhere, run.log, and metrics.jsonl."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from dinokit.runtime.files import write_text
from dinokit.runtime.signals import Stopped, should_stop

T = TypeVar("T")


class RunLog:
    """The log of a run in folder `out`; only process 0 writes. Use it in a `with` block.

    Args:
        out: the run's folder.
        steps: of the whole run.
        start: steps already done; records of later ones, left by an interrupted run, are dropped.
    """

    def __init__(self, out: Path, steps: int, start: int) -> None:
        self.main = rank() == 0
        self.judged: set[str] = set()  # evaluators that were there after step `start` already
        self.console = Console(quiet=not self.main, highlight=False, soft_wrap=True)
        self.live = self.main and sys.stdout.isatty()
        self.steps, self.begun, self.start = steps, time.monotonic(), start
        if self.main:
            self.metrics_path = out / "metrics.jsonl"
            records = _keep_records(self.metrics_path, start)
            self.judged = {key.split("/")[0] for record in records for key in record if "/" in key}
            self.text = (out / "run.log").open("a", encoding="utf-8")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("train", total=steps, completed=start)
        # Below the bar, on as many lines as they need: beside it they would push it out of the window.
        self.values = Text(no_wrap=False, overflow="fold")
        self.view = self._view()

    def __enter__(self) -> "RunLog":
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.stop()
        if self.main:
            self.text.close()

    def _view(self) -> Live:
        return Live(Group(self.progress, self.values), console=self.console, transient=True)

    def _show(self) -> None:
        if self.live:
            self.view = self._view()  # one that was stopped would go up by the lines that it had then
            self.view.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar off the terminal, so that another one can stand there."""
        self.view.stop()
        try:
            yield
        finally:
            self._show()

    def info(self, text: str) -> None:
        """A line for people, on the console and in run.log."""
        if self.main:
            self.console.print(text, markup=False)
            self._write(text)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """A line for programs, in metrics.jsonl: the values after `step` steps."""
        if self.main:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **{k: _json(v) for k, v in values.items()}}) + "\n")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values after `step` steps and show them, with the time that is left."""
        self.record(step, values)
        if not self.main:
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        left = (time.monotonic() - self.begun) / max(step - self.start, 1) * (self.steps - step)
        line = f"step {step}/{self.steps}  {text}  left {_clock(left)}"
        self._write(line)
        if self.live:
            self.progress.update(self.task, completed=step)
            self.values.plain = text
        else:
            self.console.print(line, markup=False)

    def _write(self, text: str) -> None:
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self.text.flush()


def first_and_last_scores(out: Path) -> list[str]:
    """A table, line by line: what each evaluator said of a run first, and last; empty without evaluators."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            scores = {k: v for k, v in record.items() if "/" in k and v is not None and "/images_" not in k}
            first = {**scores, **first}
            last.update(scores)
    width = max(map(len, first), default=0)
    rows = [f"{name:<{width}}  {first[name]:>9.4f}  {last[name]:>9.4f}" for name in first]
    return [f"{'':<{width}}  {'at first':>9}  {'at last':>9}", *rows] if rows else []


def watch(items: Iterable[T], total: int, text: str, done: int = 0, together: bool = False) -> Iterator[T]:
    """The items, with a progress bar on standard error while somebody watches a terminal.

    All processes go through it, each with its own items. Where signals are listened to between items
    (runtime/signals.py), all leave it with Stopped if one was told: those that were told after the item that
    they are at, the others after their last.

    Args:
        items: those that are left.
        total: how many there are with those that are done.
        text: beside the bar.
        done: how many were done before.
        together: whether the processes wait for each other at every item; then all leave after the same one.

    Raises:
        Stopped: if a process was told to stop.
    """
    console = Console(stderr=True)
    hidden = rank() > 0 or not console.is_terminal
    for item in track(items, text, total, done, console=console, disable=hidden, transient=True):
        yield item
        if should_stop(together):
            break
    if should_stop(together=True):
        raise Stopped


def info(text: str) -> None:
    """A line for people, on standard error; process 0 says it."""
    if rank() == 0:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"dinokit: {text}", markup=False)


def _json(value: Any) -> Any:
    """JSON has no infinity: fp16's overflows are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_records(path: Path, start: int) -> list[dict[str, Any]]:
    """Drop the records of later steps, or all if there is no step to go on from. Returns those of `start`."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines() if start else []
    lines = [line for line in lines if _step_of(line) <= start]
    write_text(path, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines if _step_of(line) == start]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short when the run was killed


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
