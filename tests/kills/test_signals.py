"""Signals other than kill -9, and two commands in one folder: what a training then ends with, and prints."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
INTERRUPTED = 130
EARLY = -signal.SIGTERM  # before a command handles it, a signal ends the process as any other


@pytest.fixture(scope="module")
def training(scenario, recipe):
    return scenario(["train", recipe, "run.out=run"])


def held(training, cwd):
    """A training that is stopped by SIGSTOP with its loader process, half-way."""
    half = training.changes[0] // 2
    process = training.lives.start(cwd, training.commands[0], half, group=True, number=signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    return process


def finish(training, cwd) -> None:
    """End by the same command. A stop has made a checkpoint more, so that other old ones are left."""
    training.lives.run(cwd, training.commands[0])
    training.compare(cwd, without="run/checkpoints/")


def terminated(process):
    os.killpg(process.pid, signal.SIGTERM)


def interrupted(process):
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    end = time.monotonic() + 300
    while "press Ctrl-C again" not in process.log.read_text() and time.monotonic() < end:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.killpg(process.pid, signal.SIGINT)


def without_loader(process):
    (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(number), signal.SIGKILL)


@pytest.mark.parametrize(
    ("disturb", "status"),
    [
        (lambda _: time.sleep(1), 0),
        (terminated, INTERRUPTED),
        (interrupted, INTERRUPTED),
        (without_loader, 1),
    ],
    ids=["held", "terminated", "interrupted twice", "without its loader process"],
)
def test_a_disturbed_training_ends_as_if_nothing_had_happened(training, request, disturb, status):
    cwd = training.new(request.node.callspec.id)
    process = held(training, cwd)
    disturb(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    training.lives.end(process, status)
    finish(training, cwd)


def test_a_stop_at_any_moment_is_made_good(training, fewer):
    rng = random.Random(1)
    for number in range(fewer):
        cwd = training.new(f"moment{number}")
        process = training.lives.start(cwd, training.commands[0])
        process.join(rng.random() * training.seconds[0])
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        if process.is_alive():
            os.kill(process.pid, number)
        early = EARLY if number == signal.SIGTERM else 1  # of multiprocessing, for a KeyboardInterrupt
        status = training.lives.end(process, 0, INTERRUPTED, early)
        if status == 1 and process.log.exists():  # without a log, the command had not begun
            assert "KeyboardInterrupt" in process.log.read_text()
        finish(training, cwd)


def test_a_second_command_is_refused_until_the_first_is_killed_and_the_lock_left_behind_is_none(training):
    cwd, (words,) = training.new("both"), training.commands
    first = held(training, cwd)
    second = training.lives.start(cwd, words)
    training.lives.end(second, 2)
    assert f"in use by process {first.pid}" in second.log.read_text()
    first.kill()  # its loader process stays, held
    first.join()
    assert (cwd / "run" / ".lock").exists()
    finish(training, cwd)
    training.compare(cwd)


def test_of_two_that_start_together_one_works(training):
    cwd, (words,) = training.new("race"), training.commands
    processes = [training.lives.start(cwd, words) for _ in range(2)]
    assert 0 in [training.lives.end(process, 0, 2) for process in processes]
    training.compare(cwd)


def test_of_two_processes_that_train_a_head_one_prints_the_next_command(lives, trained, tmp_path):
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{lives.free_port()}"}
    words = ["train-head", "head_promptable_scenes", f"weights={trained}", "out=head", "size=32"]
    words += ["steps=1", "batch=2", "device=cpu"]
    processes = [
        lives.start(tmp_path, words, **address, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=n, LOCAL_RANK=n)
        for n in "01"
    ]
    for process in processes:
        lives.end(process, 0)
    assert [p.log.read_text().count("dinokit segment PHOTO.jpg") for p in processes] == [1, 0]
