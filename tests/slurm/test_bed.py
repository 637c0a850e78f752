"""On a real SLURM (the test bed): runs of two nodes that are stopped in any way end like an unbroken run.

All jobs are submitted first, held, from a copy of the code. Then that copy, the recipe and the package that
it names are made unusable, so the jobs can only run the code of the time of submission.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinokit.config.load import load_recipe
from dinokit.data.sources import scenes
from dinokit.features import ExtractSpec, extract_to, open_store
from dinokit.slurm import copy_code
from dinokit.train.trainer import train
from dinokit.weights import load_backbone

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(230)]

RECIPE = """
backbone: {name: vit, size: 32, width: 24, depth: 2, heads: 2, patch: 8, layer_scale: 1.0, drop_path: 0.2}
heads: {cls: {prototypes: 32, hidden: 32, bottleneck: 16}}
losses: {dino: {}, ibot: {}}
teacher: {momentum: [0.9, 1.0], temp: [0.04, 0.07], temp_warmup: 4}
crops: {globals: {count: 2, size: 32}, locals: {count: 2, size: 16}}
masks: {images: 0.5, patches: [0.2, 0.5]}
optim: {steps: 30, batch: 4, lr: 1e-3, lr_rule: none, warmup: 2}
data: {name: slow.scenes}
run: {precision: fp32, workers: 0, log_every: 1, checkpoint_every: 7, keep_every: 14}
"""

SLOW = """
import time
from dataclasses import dataclass
from dinokit.data.sources import scenes

@dataclass
class Config:
    seconds: float = 0.1  # that an image takes: no work, so that many runs fit on one machine
    split: str = "train"

class Slow(scenes.Scenes):
    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)

    def stored(self, index):  # so that training and test images are compared without a wait
        return self.name(index).encode()

def build(cfg):
    source = Slow(scenes.Config(size=32, count=200, test_count=200, split=cfg.split))
    source.seconds = cfg.seconds
    return source
"""

# The runs: seconds an image, time limit in hours, and what is done to it when it is in its twelfth step.
RUNS = {
    "limit": (0.75, 1 / 60, None),
    "unbroken": (0.1, 0.5, None),
    "requeued": (0.3, 0.5, lambda job: ask("scontrol", "requeue", job)),
    "signalled": (0.3, 0.5, lambda job: ask("scancel", "--signal=USR2", job)),
    "terminated": (0.3, 0.5, lambda job: ask("scancel", "--signal=TERM", job)),
    "killed": (0.3, 0.5, lambda job: os.kill(process_of(job, "1"), signal.SIGKILL)),
    "moved": (0.3, 0.5, lambda job: ask("scancel", job)),
}
# For a run that ends with fewer processes: otherwise each process draws which branches to drop.
WHOLE = ("backbone.drop_path=0.0",)
OVER = "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"


def ask(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def process_of(job, rank):
    """The process that trains as `rank` in a job."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            env = dict(x.split("=", 1) for x in (path / "environ").read_text().split("\0") if "=" in x)
            words = (path / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if env.get("SLURM_JOB_ID") == job and env.get("SLURM_PROCID") == rank and "train" in words:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank} in job {job}")


class Submitter:
    """A folder from which jobs are submitted."""

    def __init__(self, folder):
        self.folder, self.jobs = folder, {}
        copy_code(folder / "checkout")
        (folder / "slow").mkdir()
        self.sources = {"recipe.yaml": RECIPE, "slow/__init__.py": "", "slow/scenes.py": SLOW}
        edited = folder / "checkout/dinokit/__init__.py"
        self.sources[str(edited.relative_to(folder))] = edited.read_text()
        self.write()

    def write(self, text=None):
        for name, good in self.sources.items():
            (self.folder / name).write_text(good if text is None else text)

    def dinokit(self, *words, status=0):
        env = {**os.environ, "PYTHONPATH": f"{self.folder / 'checkout'}:{self.folder}", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "dinokit", *words]
        process = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert process.returncode == status, process.stdout + process.stderr
        return process.stdout + process.stderr

    def submit(self, name, *words):
        output = self.dinokit("submit", "profile=cpu", "cpus=1", "memory=1", *words)
        self.jobs[name] = re.match(r"job (\d+)", output)[1]

    def train(self, name, *settings):
        seconds, hours, _ = RUNS[name]
        more = ["nodes=2", f"hours={hours}", "notice=15", *settings]
        what = [f"run.out=runs/{name}", f"data.seconds={seconds}", *(WHOLE if name == "moved" else ())]
        self.submit(name, *more, "--", "train", "recipe.yaml", *what)

    def step(self, name):
        path = self.folder / "runs" / name / "metrics.jsonl"
        return json.loads(path.read_text().splitlines()[-1])["step"] if path.exists() else 0

    def state(self, name):
        lines = ask("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", self.jobs[name]).split()
        return [line.split("|")[1] for line in lines if "|" in line]

    def log(self, name):
        return (self.folder / "runs" / name / "run.log").read_text()

    def over(self, name, jobs=1):
        """Whether all `jobs` of an array are: sacct may know of some before it knows of the others."""
        states = self.state(name)
        return len(states) >= jobs and all(state in OVER for state in states)

    def wait(self, what, holds, seconds=300):
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{what}: {ask('squeue')}{self.jobs}"
            time.sleep(1)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    if not os.environ.get("SLURM_CONF"):
        pytest.skip("needs the SLURM test bed, whose env.sh sets SLURM_CONF")
    here = Submitter(tmp_path_factory.mktemp("here"))
    try:
        for name in RUNS:
            here.train(name, "sbatch.hold=true")
        here.submit("dependent", f"after={here.jobs['requeued']}", "--", "show", "scenes_cpu")
        here.submit("in vain", f"after={here.jobs['killed']}", "--", "show", "scenes_cpu")
        here.submit("cancelled", "sbatch.hold=true", "--", "show", "scenes_cpu")
        here.write("raise SystemExit('edited')")
        ask("scontrol", "release", *[here.jobs[name] for name in RUNS])
        todo = {name: act for name, (_, _, act) in RUNS.items() if act}
        while todo:
            here.wait(f"{list(todo)} begin", lambda: any(here.step(name) >= 12 for name in todo))
            for name in [name for name in todo if here.step(name) >= 12]:
                todo.pop(name)(here.jobs[name])
        yield here
    finally:
        for job in here.jobs.values():
            subprocess.run(["scancel", job], check=False)


def assert_same_weights(here, name):
    one, two = (load_file(here.folder / "runs" / n / "teacher.safetensors") for n in ("unbroken", name))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def assert_resumes(here, name):
    here.wait(name, lambda: here.over(name) and here.over("unbroken"))
    assert here.state("unbroken") == ["COMPLETED"]
    assert here.state(name) == ["COMPLETED"], here.log(name)
    stopped = re.findall(r"stopped after step (\d+)", here.log(name))
    begun = re.findall(r"resumes after step (\d+)", here.log(name))
    assert begun
    if name != "requeued":  # there SLURM gives KillWait to save, here five seconds: on a busy machine too few
        assert stopped == begun
    assert_same_weights(here, name)


@pytest.mark.parametrize("name", ["requeued", "signalled", "terminated"])
def test_a_stopped_run_resumes_by_itself_and_ends_like_an_unbroken_one(here, name):
    assert_resumes(here, name)


def test_a_killed_process_fails_the_job_and_the_same_command_resumes_the_run(here):
    here.wait("killed", lambda: here.over("killed"))
    assert here.state("killed") == ["FAILED"]
    here.write()
    assert "task 1: Killed" in here.dinokit("submit", "logs", here.jobs["killed"])
    here.train("killed")
    here.wait("killed", lambda: here.over("killed"))
    assert "resumes after step 7" in here.log("killed")
    assert_same_weights(here, "killed")


def test_a_run_of_two_nodes_resumes_on_one_and_ends_like_a_run_of_one(here):
    here.wait("moved", lambda: here.over("moved"))
    assert here.state("moved") == ["CANCELLED"]
    here.write()
    here.train("moved", "nodes=1")
    settings = [f"run.out={here.folder / 'runs/whole'}", "data.name=scenes", *WHOLE]
    whole = load_recipe(here.folder / "recipe.yaml", settings)
    train(whole, scenes.build(scenes.Config(size=32, count=200, split="train")))
    here.wait("moved", lambda: here.over("moved"))
    assert here.state("moved") == ["COMPLETED"], here.log("moved")
    assert re.search(r"2 processes.*stopped after step (\d+).*resumes after step \1", here.log("moved"), re.S)
    one, two = (load_file(here.folder / "runs" / n / "teacher.safetensors") for n in ("whole", "moved"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=3e-5)


def test_a_dependent_job_waits_through_every_restart(here):
    here.wait("dependent", lambda: here.over("dependent") and here.over("in vain"))
    assert here.state("dependent") == ["COMPLETED"]
    assert here.state("in vain") == ["CANCELLED"]  # what it waited for failed

    def times(name, field):
        return ask("sacct", "-X", "-n", "-P", "-o", field, "-j", here.jobs[name]).strip()

    assert times("requeued", "End") <= times("dependent", "Start")


def test_status_logs_and_cancel(here):
    lines = here.dinokit("submit", "status").splitlines()
    assert any(line.startswith(here.jobs["unbroken"]) and "COMPLETED" in line for line in lines)
    here.dinokit("submit", "cancel", here.jobs["cancelled"])
    assert "CANCELLED" in here.dinokit("submit", "status", here.jobs["cancelled"])
    assert "has written no log yet" in here.dinokit("submit", "logs", here.jobs["cancelled"])
    assert "finished: runs/unbroken/teacher.safetensors" in here.dinokit(
        "submit", "logs", here.jobs["unbroken"]
    )


def test_an_array_evaluates_every_saved_teacher(here):
    data = [
        "train.name=scenes",
        "train.split=train",
        "train.count=60",
        "test.name=scenes",
        "test.split=test",
        "test.test_count=30",
    ]
    every = "array=runs/unbroken/teachers/*.safetensors"
    here.submit("array", every, "--", "eval", "knn", "weights={}", "k=[5]", "device=cpu", *data)
    here.wait("array", lambda: here.over("array", 2))
    assert here.state("array") == ["COMPLETED", "COMPLETED"]
    output = here.dinokit("submit", "logs", here.jobs["array"]).splitlines()
    evaluated = [json.loads(line)["weights"] for line in output if line.startswith("{")]
    assert evaluated == [f"runs/unbroken/teachers/step_00000{n}.safetensors" for n in (14, 28)]


def test_a_stopped_evaluation_on_two_nodes_resumes_and_has_the_same_scores(here):
    here.write()
    grid = [
        "mode=online",
        "blocks=[1]",
        "pool=[false]",
        "lr=[0.1]",
        "steps=20",
        "step_batch=8",
        "save_every=1",
    ]
    data = ["train.name=slow.scenes", "test.name=slow.scenes", "test.split=test"]
    data += ["test.seconds=0.0", "workers=0", "device=cpu"]
    words = ["eval", "linear", "backbone.name=pixels", "backbone.size=32", *grid, *data]
    for name, seconds in (("whole", 0.01), ("stopped", 0.3)):
        here.submit(name, "nodes=2", "--", *words, f"train.seconds={seconds}", f"out=evaluated/{name}")
    here.wait("stopped", lambda: list(here.folder.glob("evaluated/stopped/**/.linear_*.pt")))
    ask("scancel", "--signal=USR2", here.jobs["stopped"])
    here.wait("stopped", lambda: here.over("whole") and here.over("stopped"))
    assert here.state("whole") + here.state("stopped") == ["COMPLETED"] * 2
    assert "interrupted: the same command resumes" in here.dinokit("submit", "logs", here.jobs["stopped"])
    (whole,), (stopped,) = (
        [
            json.loads(line)
            for line in (here.folder / "evaluated" / name / "results.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "stopped")
    )
    del whole["about"], stopped["about"]
    assert whole == stopped


def test_an_array_divides_the_images_of_one_store_of_features(here):
    data = ["data.name=scenes", "data.size=32", "data.count=60", "data.split=train", "shard=10", "device=cpu"]
    words = ["extract", "weights=runs/unbroken", *data, "workers=0", "precision=fp32", "out=features"]
    here.wait("unbroken", lambda: here.over("unbroken"))
    here.submit("features", "array=0-1", "--", *words, "part={}/2")
    here.wait("features", lambda: here.over("features", 2))
    assert here.state("features") == ["COMPLETED", "COMPLETED"]
    source = scenes.build(scenes.Config(size=32, count=60, split="train"))
    backbone = load_backbone(here.folder / "runs/unbroken")
    alone = extract_to(here.folder / "alone", backbone, source, ExtractSpec(shard=10))
    store = open_store(here.folder / "features")
    assert list(store.iter_names()) == list(alone.iter_names())
    assert np.allclose(store["cls"][:], alone["cls"][:], atol=2e-3)  # of float16


def test_an_array_runs_a_stage_of_a_curation_and_the_next_job_finds_it_finished(here):
    pool = [
        "pool.name=scenes",
        "pool.size=32",
        "pool.count=40",
        "pool.split=train",
        "weights=runs/unbroken",
        "out=curated",
    ]
    hashes = ["curate", "curate_small", *pool, "stage=hash"]
    here.wait("unbroken", lambda: here.over("unbroken"))
    here.submit("parts", "array=0-1", "--", *hashes, "part={}/2")
    here.wait("parts", lambda: here.over("parts", 2))
    shards = {path: path.stat().st_mtime_ns for path in here.folder.glob("curated/stages/hash.*/pool/*.npy")}
    here.submit("joined", f"after={here.jobs['parts']}", "--", *hashes)
    here.wait("joined", lambda: here.over("joined"))
    assert here.state("parts") + here.state("joined") == ["COMPLETED"] * 3
    assert '"stage": "hash"' in here.dinokit("submit", "logs", here.jobs["joined"])
    assert shards
    assert shards == {path: path.stat().st_mtime_ns for path in shards}


def test_a_command_in_the_queue_is_not_submitted_again(here):
    train = ["submit", "profile=cpu", "sbatch.hold=true", "--", "train", "scenes_cpu", "run.out=runs/twice"]
    number = re.match(r"job (\d+)", here.dinokit(*train))[1]
    assert (
        f"Job {number} is PENDING (JobHeldUser) and runs the same command: train scenes_cpu"
        in here.dinokit(*train, status=2)
    )
    here.dinokit("submit", "cancel", number)
    here.dinokit("submit", "cancel", re.match(r"job (\d+)", here.dinokit(*train))[1])


def test_waiting_for_a_failed_or_unknown_job_is_refused(here):
    evaluate = "--", "eval", "knn", "backbone.name=pixels"
    output = here.dinokit("submit", "profile=cpu", "after=1", *evaluate, status=2)  # none had so low a number
    assert "after=1: SLURM knows no such job" in output
    here.wait("killed", lambda: here.over("in vain"))
    output = here.dinokit("submit", "profile=cpu", f"after={here.jobs['in vain']}", *evaluate, status=2)
    assert f"after={here.jobs['in vain']}: that job is CANCELLED" in output


def test_an_unknown_partition_is_an_error_that_lists_the_partitions(here):
    output = here.dinokit("submit", "profile=cpu", "partition=man", "--", "train", "scenes_cpu", status=2)
    assert "There is no partition 'man'. Did you mean 'main'? sinfo has: main." in output


def test_more_nodes_than_there_are_is_an_error(here):
    output = here.dinokit("submit", "profile=cpu", "nodes=4", "--", "train", "scenes_cpu", status=2)
    assert "nodes=4, but partition main has 2." in output


def test_an_error_of_slurm_is_shown_and_no_folder_is_left(here):
    before = set((here.folder / "runs/jobs").iterdir())
    output = here.dinokit("submit", "profile=cpu", "gpus=1", "--", "train", "scenes_cpu", status=2)
    assert "SLURM refuses the job: sbatch: error: " in output
    assert set((here.folder / "runs/jobs").iterdir()) == before


def test_a_run_that_reaches_its_time_limit_resumes_until_it_is_finished(here):
    assert_resumes(here, "limit")  # last, for it takes longest
