"""Of two processes that train together one or both are killed: all end, and the same command resumes."""

import logging
import random
import shutil
import signal
import time
from multiprocessing.connection import wait

import pytest

pytestmark = pytest.mark.slow
GRACE = 30  # seconds
WORDS = "run.workers=0", "optim.batch=4"


def start_both(lives, cwd, words, kill_at=(None, None)):
    """Start two processes with the environment that torchrun gives them."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": f"{lives.free_port()}",
    }
    return [
        lives.start(cwd, words, kill_at[rank], **shared, RANK=f"{rank}", LOCAL_RANK=f"{rank}")
        for rank in range(2)
    ]


def end_both(lives, processes):
    """Their statuses, with torchrun's part: if one fails, the other gets SIGTERM, and SIGKILL 30 s later.

    It may wait for a process that was killed before it could answer at all.
    """
    wait([process.sentinel for process in processes])
    for process in processes:
        process.join(GRACE)
        for stop in (process.terminate, process.kill):
            if process.exitcode is None:
                stop()
                process.join(GRACE)
    return [lives.end(process, 0, 1, 130, -signal.SIGTERM, -signal.SIGKILL) for process in processes]


def run_both(lives, cwd, words) -> None:
    for process in start_both(lives, cwd, words):
        lives.end(process, 0)


def test_two_processes_of_which_one_or_both_are_killed(scenario, recipe, fewer):
    rng, words = random.Random(2), ["train", recipe, "run.out=run", *WORDS]
    alone = scenario(words)  # for its folders; what two processes compute differs in the last bits
    whole = alone.new("together")
    begin = time.monotonic()
    run_both(alone.lives, whole, words)
    alone.whole, seconds = whole, time.monotonic() - begin
    killed = rounds = 0
    while killed < fewer:
        cwd = alone.new(f"broken{rounds}")
        for _ in range(rng.randint(1, 3)):
            by_change = rng.random() < 0.5  # process 0 writes
            at = rng.randint(1, alone.changes[0]) if by_change else None
            processes = start_both(alone.lives, cwd, words, (at, None))
            if not by_change:
                processes[0].join(rng.random() * seconds)
                for process in rng.choice([processes[:1], processes[1:], processes]):
                    process.kill()
            statuses = end_both(alone.lives, processes)
            killed += -signal.SIGKILL in statuses
            assert statuses == [0, 0] or -signal.SIGKILL in statuses, statuses
        run_both(alone.lives, cwd, words)
        # Which process writes which tensor of a checkpoint is torch's choice, another one in every run.
        alone.compare(cwd, without="run/checkpoints/")
        shutil.rmtree(cwd)
        rounds += 1
    logging.getLogger(__name__).info(
        f"{killed} times one or both of two processes killed, in {rounds} rounds"
    )
