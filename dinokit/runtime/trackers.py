"""Experiment trackers: a run's records and pictures in TensorBoard, Weights & Biases, MLflow or trackio.

`run.log=[tensorboard]` chooses them. metrics.jsonl is written in any case (dinokit.runtime.log). Each tracker
has a thread, so a training does not wait for its server; one that fails or does not answer is left out from
then on, and the run goes on.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from dinokit.config.registry import suggest
from dinokit.runtime.distributed import rank
from dinokit.runtime.files import write_text

Picture = NDArray[np.uint8]  # (H, W, 3)
PROJECT = "dinokit"  # the project or experiment that runs are listed in
SECONDS = 60.0  # without an answer, after which a tracker is left out
PATIENCE, POLL = 5.0, 0.1  # s at the end of a run: before a line says what is waited for; between two looks
QUEUED = 1000  # records and pictures that may wait for a tracker
IDS = "trackers.json"  # in a run's folder: the trackers' own names of the run, to resume under


class Tracker(Protocol):
    """Where a run is followed. Its methods may raise anything; Trackers handles it."""

    def start(self, out: Path, settings: Mapping[str, Any], step: int, run_id: str) -> str:
        """Begin, or resume after `step` steps if there is a `run_id`. Returns the tracker's id of the run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, after `step` steps."""

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Pictures by name, after `step` steps."""

    def end(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def start(self, out: Path, settings: Mapping[str, Any], step: int, run_id: str) -> str:
        # What an interrupted run wrote after its last checkpoint is done again.
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(
            out / "tensorboard", purge_step=step + 1 if run_id else None
        )
        if not run_id:
            self.writer.add_text("recipe", "```\n" + json.dumps(settings, indent=1, default=str) + "\n```")
        return out.name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        for name, picture in pictures.items():
            self.writer.add_image(name, picture, step, dataformats="HWC")
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, as its own environment variables say (WANDB_MODE=offline: without a network)."""

    def start(self, out: Path, settings: Mapping[str, Any], step: int, run_id: str) -> str:
        self.wandb = import_module("wandb")
        run_id = run_id or uuid4().hex[:8]
        self.run = self.wandb.init(
            project=PROJECT, name=out.name, id=run_id, resume="allow", dir=out, config=dict(settings)
        )
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        self.run.log({name: self.wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def end(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow, on the server of MLFLOW_TRACKING_URI or in the working folder."""

    def start(self, out: Path, settings: Mapping[str, Any], step: int, run_id: str) -> str:
        mlflow = import_module("mlflow")
        mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=run_id or None, run_name=None if run_id else out.name)
        self.mlflow = mlflow
        if not run_id:
            mlflow.log_dict(dict(settings), "recipe.json")
        return str(run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({_allowed(name): value for name, value in values.items()}, step=step)

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        for name, picture in pictures.items():
            self.mlflow.log_image(picture, key=_allowed(name), step=step)

    def end(self) -> None:
        self.mlflow.end_run()


class Trackio:
    """trackio, with its data where TRACKIO_DIR says."""

    def start(self, out: Path, settings: Mapping[str, Any], step: int, run_id: str) -> str:
        self.trackio = import_module("trackio")
        run_id = run_id or f"{out.name}-{uuid4().hex[:8]}"
        self.trackio.init(project=PROJECT, name=run_id, resume="allow", config=dict(settings))
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        self.trackio.log({name: self.trackio.Image(value) for name, value in pictures.items()}, step=step)

    def end(self) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_installed(names: Sequence[str]) -> None:
    """Check `run.log`.

    Raises:
        ValueError: for a tracker that does not exist.
        RuntimeError: for one that is not installed; it says how to install it.
    """
    for name in names:
        if name not in TRACKERS:
            near = suggest(name, list(TRACKERS))
            raise ValueError(f"run.log={name}: no such tracker.{near} There is: {', '.join(TRACKERS)}.")
        if find_spec(name) is None:
            raise RuntimeError(f"run.log={name} needs the package {name}: pip install {name}")


class TrackerThread:
    """Calls the methods of a tracker in order, in a thread of its own; none after one that failed."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.failure = ""
        self.records = self.passed_on = 0  # records and pictures: given to call(), and taken by the tracker
        self.begun = math.inf  # when the present call began
        self.calls: Queue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = Queue(QUEUED)
        # A daemon: a server that never answers must not keep the program from ending.
        self.thread = Thread(target=self._work, name=type(tracker).__name__, daemon=True)
        self.thread.start()

    def call(self, method: Callable[..., Any], *values: Any) -> Future[Any]:
        """Call a method after those before it; the result is None if it failed."""
        future: Future[Any] = Future()
        self.records += method not in (self.tracker.start, self.tracker.end)
        self.calls.put_nowait((future, method, values))
        return future

    def trouble(self) -> str:
        """Why the tracker is to be left out; "" if it is in order."""
        silent = time.monotonic() - self.begun > SECONDS
        return self.failure or (f"it did not answer for {SECONDS:g} s" if silent else "")

    def waiting(self) -> int:
        """Records and pictures that the tracker has not taken yet."""
        return self.records - self.passed_on

    def stop(self) -> None:
        """Drop the calls that wait. The thread ends with the call that it is in."""
        with suppress(Empty):
            while True:
                self.calls.get_nowait()
        self.calls.put_nowait(None)

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            (future, method, values), result = call, None
            self.begun = time.monotonic()
            try:
                if not self.failure:
                    result = method(*values)
                    self.passed_on += method not in (self.tracker.start, self.tracker.end)
            except Exception as error:  # a server away or a full disk of a tracker must not end a training
                self.failure = f"{type(error).__name__}: {error}"
            self.begun = math.inf
            future.set_result(result)
            if method == self.tracker.end:
                return


class Trackers:
    """The trackers of a run. Only process 0 has any.

    Args:
        names: of TRACKERS.
        out: the run's folder.
        settings: of the run.
        step: steps that are done; above 0 the run resumes.
        say: prints a line for people.
    """

    def __init__(
        self,
        names: Sequence[str],
        out: Path,
        settings: Mapping[str, Any],
        step: int,
        say: Callable[[str], None],
    ) -> None:
        self.say, self.no_pictures = say, False
        self.active = {name: TrackerThread(TRACKERS[name]()) for name in names if rank() == 0}
        if not self.active:
            return
        path = out / IDS
        ids = json.loads(path.read_text("utf-8")) if step and path.is_file() else {}
        started = {
            name: thread.call(thread.tracker.start, out, settings, step, ids.get(name, ""))
            for name, thread in self.active.items()
        }
        for name, future in started.items():
            if self._answered(name, future):
                ids[name] = future.result()
        write_text(path, json.dumps(ids))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass on what is a finite number."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for thread in self._in_order().values():
            thread.call(thread.tracker.scalars, step, numbers)

    def pictures(self, step: int, draw: Callable[[], Mapping[str, Picture]]) -> None:
        """Draw pictures (H, W, 3), and pass them on by name; without trackers nothing is drawn."""
        if not self.active or self.no_pictures:
            return
        try:
            drawn = draw()
        except Exception as error:  # they are no reason to end a training either
            self.no_pictures = True
            self.say(f"No pictures for trackers: {type(error).__name__}: {error}. The run goes on.")
            return
        for thread in self._in_order().values():
            thread.call(thread.tracker.pictures, step, drawn)

    def end(self) -> None:
        """End all trackers, when they have passed on what waits: each is waited for as long as it answers."""
        ended = {name: thread.call(thread.tracker.end) for name, thread in self._in_order().items()}
        wait(ended.values(), PATIENCE)
        for name, future in ended.items():
            if not future.done():
                self.say(f"Waiting for {name}: {self.active[name].waiting()} records to pass on.")
            self._answered(name, future)
        self.active.clear()

    def _answered(self, name: str, call: Future[Any]) -> bool:
        """Wait for a call as long as the tracker answers. Whether it ended well; else it is left out."""
        thread = self.active[name]
        while not call.done() and not thread.trouble():
            wait([call], POLL)
        if trouble := thread.trouble():
            self._leave_out(name, trouble)
        return not trouble

    def _in_order(self) -> dict[str, TrackerThread]:
        """The active trackers; those in trouble are left out from now on, with a line that says so."""
        for name, thread in list(self.active.items()):
            behind = f"it is {QUEUED} records behind" if thread.calls.full() else ""
            if trouble := thread.trouble() or behind:
                self._leave_out(name, trouble)
        return dict(self.active)

    def _leave_out(self, name: str, trouble: str) -> None:
        thread = self.active.pop(name)
        thread.stop()
        lost = f" {thread.waiting()} records were not passed on." if thread.waiting() else ""
        self.say(f"{name} is left out from now on: {trouble}.{lost} The run goes on.")


def _allowed(name: str) -> str:
    """MLflow's names have no @."""
    return name.replace("@", "_at_")
