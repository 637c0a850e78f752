"""What one of several processes does in a test: run by `together` (conftest.py), never collected.

It is executed as a file in a fresh process, with ENVIRONMENT, JOB (name of a function,
its arguments) and LOG, the file for what is written to stderr, as globals.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from dinokit.commands import Command
from dinokit.commands import train as train_command
from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.losses import Views
from dinokit.losses.contrastive import info_nce
from dinokit.losses.koleo import koleo
from dinokit.models.head import LazyLogits
from dinokit.runtime.distributed import gather_objects, rank, world_size
from dinokit.runtime.launch import Watchdog, process_group
from dinokit.runtime.signals import Stopped
from dinokit.train import trainer
from dinokit.train.checkpoint import Checkpoints
from dinokit.train.step import Step
from dinokit.train.trainer import Evaluator

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def train(recipe, overrides, evaluate=None):
    """A run. `evaluate` names one of the evaluators below."""
    recipe = load_recipe(recipe, overrides)
    evaluators = [Evaluator("probe", 2, globals()[evaluate])] if evaluate else []
    trainer.train(recipe, registry.build("data.sources", recipe.data), evaluators)


def train_students(recipe, overrides):
    """A job of several students, as `dinokit train` does it."""
    train_command.run(Command([recipe], [*overrides, "run.report=false"]))


def kill_one_student(recipe, overrides):
    """The last process is killed in its fifth step, after the first student has saved step 4."""
    real = Step.__call__
    out = Path(next(text for text in overrides if text.startswith("run.out=")).partition("=")[2])

    def step(self, batch):
        if batch.step == 4 and is_last():
            while not (out / "students" / "small" / "checkpoints" / "step_0000004").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)

    Step.__call__ = step
    train_students(recipe, overrides)


def several_runs(recipe, runs):
    """One run after the other, each with its own overrides, to spare the start of processes."""
    for overrides in runs:
        train(recipe, overrides)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def stop_after(recipe, overrides, steps, job="train"):
    """The last process is asked to stop after so many steps: one of all, by a real signal."""
    real, calls = Step.__call__, []

    def step(self, batch):
        losses = real(self, batch)
        calls.append(batch.step)
        if len(calls) == steps and is_last():
            signal.raise_signal(signal.SIGTERM)
        return losses

    Step.__call__ = step
    globals()[job](recipe, overrides)


def is_last():
    """Whether no process was started after this one."""
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def save_for_ever(folder, first):
    """Checkpoint after checkpoint, alone; each is named on stderr when it was begun."""
    for key in [key for key in os.environ if key in ENVIRONMENT]:  # noqa: F821
        del os.environ[key]
    with Checkpoints(Path(folder), keep=2) as saved:
        for i in range(first, 10**6):
            saved.save(i, {"x": torch.full((2 * 10**6,), float(i)), "y": torch.full((10**5,), float(i))}, {})
            sys.stderr.write(f"{i}\n")
            sys.stderr.flush()


def unequal(backbone):
    """Calls the backbone more often in one process than in another, as one with uneven shares does."""
    for _ in range(1 + 2 * rank()):
        tokens = backbone([torch.ones(1, 3, 32, 32)], [None])[0]
    return {"size": float(tokens.cls.norm())}


def contrast(folder):
    """Loss and gradient of this process's images, compared with those of all processes."""
    with process_group(CPU, 5):
        z = torch.load(f"{folder}/z.pt").chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
        loss = info_nce(z, 2, 0.2, distributed=True)
        loss.backward()
        torch.save({"loss": loss.detach(), "grad": z.grad}, f"{folder}/{rank()}.pt")


def koleo_in_groups(folder, group):
    """Loss and gradient of this process's rows, whose neighbours are searched in its group of all rows."""
    with process_group(CPU, 5):
        x = torch.load(f"{folder}/x.pt").chunk(world_size())[rank()].clone().requires_grad_()
        loss = koleo(x, distributed=True, group=group)
        loss.backward()
        torch.save({"loss": loss.detach(), "grad": x.grad}, f"{folder}/{rank()}.pt")


def spread(folder, loss):
    """Loss and gradient of this process's class features (G, B, D), which count with those of all."""
    none = LazyLogits(torch.empty(0, 1), torch.empty(0, 1))
    with process_group(CPU, 5):
        x = torch.load(f"{folder}/x.pt").chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
        module = registry.build("losses", {"name": loss, "distributed": True})
        value = module(Views(none, none, x, none, none, torch.empty(0), 0.04))
        value.backward()
        torch.save({"loss": value.detach(), "grad": x.grad}, f"{folder}/{rank()}.pt")


def fail_in_one(recipe, overrides, job="train"):
    """The last process fails in its third step."""
    real = Step.__call__

    def failing_step(self, batch):
        if batch.step == 2 and is_last():
            raise RuntimeError("a bug in one process")
        return real(self, batch)

    Step.__call__ = failing_step
    globals()[job](recipe, overrides)


def hang_in_one(recipe, overrides):
    """Process 1 hangs before its third step; process 0 waits for it, without a watchdog of its own."""
    real, calls = Watchdog.reset, []

    def reset(self):
        calls.append(0)
        if len(calls) == 3:
            self.pause()
        if len(calls) != 3 or rank() == 1:
            real(self)
        if len(calls) == 3 and rank() == 1:
            sleep_for_ever()

    def sleep_for_ever():
        time.sleep(1000)

    Watchdog.reset = reset
    train(recipe, overrides)


def leave(how):
    """Join, and part in the way that is named; the threads that still run then are written to stderr."""
    try:
        with process_group(CPU, 5):
            if how == "failed" and rank() == 1:
                raise ValueError("this was wrong")
            gather_objects(None)
            if how == "stopped":
                raise Stopped
    finally:
        left = [t for t in threading.enumerate() if t is not threading.main_thread()]
        sys.stderr.write(f"left: {[type(t).__name__ for t in left]}\n")


def see_other_data(recipe, overrides, folders):
    """Each process is given its own folder of images."""
    train(recipe, [*overrides, f"data.path={folders[int(os.environ['RANK'])]}"])


def see_other_folder(recipe, overrides, outs):
    """Each process has its own run.out behind the same name."""
    os.chdir(outs[int(os.environ["RANK"])])
    train(recipe, overrides)


def golden(name, parallel):
    """The recorded trajectory, each process with its share of the images."""
    tests = runpy.run_path(str(HERE / "test_golden_steps.py"))
    conftest = runpy.run_path(str(HERE.parent / "conftest.py"))
    with process_group(CPU, 5):
        tests["in_several_processes"](conftest["Golden"](name), parallel)
        gather_objects(None)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)  # noqa: F821
    os.dup2(os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)  # noqa: F821
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))  # for own_images
    what, arguments = JOB  # noqa: F821
    try:
        globals()[what](*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        sys.stderr.write(f"ERROR {type(error).__name__}: {error}{notes}\n")
        sys.exit(2)
