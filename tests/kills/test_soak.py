"""A long training with evaluations, checkpoints and loader processes: what it uses does not grow.

DINOKIT_SOAK is the number of steps; DINOKIT_SOAK_MINUTES ends a run that takes longer.
"""

import contextlib
import json
import logging
import os
import re
import signal
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

STEPS = int(os.environ.get("DINOKIT_SOAK", "2000"))
MINUTES = float(os.environ.get("DINOKIT_SOAK_MINUTES", "60"))
PARTS = 5  # of a run: the first one warms up, and the last is compared with the second
# Growth that is none: what the allocator keeps of differing evaluations, in MiB; and a share of all.
SLACK, SHARE = 12, 0.02
SMALL = (
    "backbone.width=16", "backbone.depth=1", "backbone.size=16", "backbone.patch=4",
    "heads.cls.prototypes=16", "heads.cls.hidden=16", "crops.globals.size=16", "crops.locals.count=0",
    "run.workers=2", "run.log_every=50", "run.checkpoint_every=100", "run.keep_every=0",
    "evals.knn.every=200", "evals.knn.workers=1", "evals.knn.size=16", "evals.knn.resize=16",
)  # fmt: skip


@dataclass
class Use:
    """What the processes of a run use at a moment."""

    step: int
    memory: float  # MiB that belong to them: RSS without what they share with the process that forked them
    processes: int
    descriptors: int
    threads: int
    shared: int  # files in /dev/shm


def use_of(group: int, step: int) -> Use:
    memory = processes = descriptors = threads = 0
    numbers = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, StopIteration):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                continue
            rss = re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
            descriptors += len(list((folder / "fd").iterdir()))
            threads += len(list((folder / "task").iterdir()))
            memory += sum(map(int, rss)) / 1024
            processes += 1
            numbers.add(folder.name)
    shared = [path for path in Path("/dev/shm").glob("torch_*") if numbers & set(path.name.split("_"))]
    return Use(step, memory, processes, descriptors, threads, len(shared))


def medians(uses: list[Use]) -> dict[str, float]:
    return {key: statistics.median(asdict(use)[key] for use in uses) for key in asdict(uses[0])}


@pytest.mark.slow
def test_what_a_long_training_uses_stays_flat(lives, recipe, tmp_path):
    words = ["train", recipe, "run.out=run", f"optim.steps={STEPS}", *SMALL]
    process, end = lives.start(tmp_path, words), time.monotonic() + 60 * MINUTES
    metrics, uses = tmp_path / "run" / "metrics.jsonl", []
    with (lives.folder / "soak.jsonl").open("w") as samples:
        while process.is_alive():
            step = 0
            with contextlib.suppress(OSError, ValueError, IndexError):
                step = json.loads(metrics.read_text().splitlines()[-1])["step"]
            if 0 < step < STEPS:
                uses.append(use_of(process.pid, step))
                samples.write(json.dumps(asdict(uses[-1])) + "\n")
                samples.flush()
            if time.monotonic() > end:
                os.kill(process.pid, signal.SIGTERM)
                end += 60 * MINUTES
            process.join(0.25)
    lives.end(process, 0, 130)
    last = max(use.step for use in uses)
    parts = [[use for use in uses if last * k <= use.step * PARTS < last * (k + 1)] for k in range(PARTS)]
    early, late = medians(parts[1]), medians(parts[-1])
    logging.getLogger(__name__).info(
        f"{last} steps; medians early {early}, late {late}; {lives.folder / 'soak.jsonl'}"
    )
    assert late["memory"] - early["memory"] <= SLACK + SHARE * early["memory"]
    assert all(late[key] <= early[key] for key in ("processes", "descriptors", "threads", "shared"))
