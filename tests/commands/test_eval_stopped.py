"""Evaluations that get a stop signal: they log it, end with the status that requeues a job, and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinokit.__main__ import main

pytestmark = pytest.mark.usefixtures("signals_given_back")

# Images of the built-in scenes. Each that is looked at adds a letter to the file `looked`; if that is as long
# as the file `stop` says, this process is sent the signal that stands there.
LOOKING = """
import signal, time
from dataclasses import dataclass
from pathlib import Path
from dinokit.data.{kind} import scenes

@dataclass
class Config:
    split: str = "train"

class Looking(scenes.build):
    def __getitem__(self, index):
        with Path("looked").open("a") as file:
            file.write("x")
            long = file.tell()
        if Path("stop").exists():
            number, name = Path("stop").read_text().split()
            if long == int(number):
                signal.raise_signal(signal.Signals[name])
        if Path("slow").exists():
            time.sleep(0.02)
        return super().__getitem__(index)

    def stored(self, index):  # so that training and test images are compared without being looked at
        return self.name(index).encode()

def build(cfg):
    return Looking(scenes.Config(size=64, count=60, test_count=20, split=cfg.split))
"""
COMMON = ["workers=0", "precision=fp32", "device=cpu", "out=out"]
CASES = {
    "knn": [
        "backbone.name=pixels", "backbone.size=32", "k=[5]", "batch=10", "cache=cache",
    ],
    "linear": [
        "backbone.name=pixels", "backbone.size=32", "mode=online", "blocks=[1]", "pool=[false]", "lr=[0.1]",
        "steps=9", "step_batch=10", "save_every=1000", "cache=cache",
    ],
    "segmentation": [
        "backbone.name=raw_patches", "backbone.size=32", "resize=64", "crop=32", "stride=32", "steps=12",
        "batch=8", "save_every=1000",
    ],
}  # fmt: skip


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The maker of command lines, words("knn")."""
    (tmp_path / "looking").mkdir()
    for kind in ("sources", "dense"):
        (tmp_path / "looking" / f"{kind}.py").write_text(LOOKING.format(kind=kind))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(what):
        name = "looking.dense" if what == "segmentation" else "looking.sources"
        data = [f"{key}.{each}" for key in ("train", "test") for each in (f"name={name}", f"split={key}")]
        return ["eval", what, *CASES[what], *COMMON, *data]

    return make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Go to a folder, folder("a")."""

    def go(name):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

    return go


def looked():
    return len(Path("looked").read_text())


def scores(text):
    return {k: v for k, v in json.loads(text.splitlines()[-1]).items() if k != "about"}


@pytest.mark.parametrize("what", CASES)
def test_an_evaluation_stopped_half_way_resumes_to_the_same_scores(what, words, folder, capfd):
    folder("whole")
    assert main(words(what)) == 0
    want, whole = scores(capfd.readouterr().out), looked()
    folder("broken")
    for at, name in ((whole // 4, "SIGUSR1"), (whole // 2, "SIGINT")):
        Path("stop").write_text(f"{at} {name}")
        assert main(words(what)) == 130
        out, err = capfd.readouterr()
        assert not out
        assert err.endswith("dinokit: interrupted: the same command resumes\n")
        assert ("stops after the current batch or step; press Ctrl-C again" in err) == (name == "SIGINT")
        assert looked() < at + 12  # it stopped after this batch
    assert main(words(what)) == 0
    assert scores(capfd.readouterr().out) == want
    assert looked() <= whole + 12  # opening a source may look at its first images


LIST = """
knn: {k: [5], batch: 10}
linear: {mode: online, blocks: [1], pool: [false], lr: [0.1], steps: 9, step_batch: 10}
"""


def test_a_stopped_list_resumes_after_its_finished_evaluators(words, folder, capfd):
    folder("broken")
    Path("list.yaml").write_text(LIST)
    _, _, *rest = words("knn")
    command = [
        "eval",
        "all",
        "recipe=list.yaml",
        *(word for word in rest if not word.startswith(("k=", "batch="))),
    ]
    command += ["cache=null"]
    Path("stop").write_text("120 SIGTERM")
    assert main(command) == 130
    first = capfd.readouterr().out
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert "dinokit: resumes after knn; to evaluate these again, delete out/.list_" in err
    assert out.startswith(first)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [line["eval"] for line in lines] == ["knn", "linear"]
    assert [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()] == lines
    assert not list(Path("out").glob(".list_*"))
    assert main(command) == 0  # and now from the beginning
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 4


DEMO = [
    "data.name=looking.sources", "data.split=train", "optim.steps=1", "optim.batch=4", "optim.warmup=0",
    "teacher.temp_warmup=0", "backbone.depth=1", "heads.cls.prototypes=64", "heads.patch=null",
    "run.workers=0", "run.device=cpu", "run.precision=fp32", "run.out=run", "evals.knn.workers=0",
    "evals.knn.every=1",
]  # fmt: skip


@pytest.mark.slow
def test_a_demo_that_is_stopped_at_its_last_step_does_not_evaluate(words, folder, capfd):
    folder("broken")
    Path("stop").write_text("150 SIGTERM")  # of 80 + 4 + 80: scored, a step, scored again
    assert main(["demo", *DEMO]) == 130
    assert looked() <= 80 + 4 + 80 + 60 + 60  # the first batch to be evaluated, and the images of the signals
    out, err = capfd.readouterr()
    assert "your network" not in out
    assert err.endswith("dinokit: interrupted\n")
    assert Path("run/teacher.safetensors").exists()


def started(words, ranks, port):
    """As a shell does it, or a launcher: a process a rank."""
    many = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(ranks):
        env = {**os.environ, **({"RANK": str(rank), "LOCAL_RANK": str(rank), **many} if ranks > 1 else {})}
        command = [sys.executable, "-W", "ignore", "-m", "dinokit", *words]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        )
    return processes


def ended(processes):
    """Status, standard output and standard error of each."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ranks", "number"),
    [
        ("knn", 1, signal.SIGINT),
        ("knn", 2, signal.SIGUSR2),
        ("linear", 2, signal.SIGUSR1),
        ("segmentation", 2, signal.SIGTERM),
    ],
)
def test_a_signal_to_the_last_process_stops_all(what, ranks, number, words, folder, free_port):
    folder("whole")
    alone = ended(started(words(what), ranks, free_port()))
    assert [status for status, _, _ in alone] == [0] * ranks, alone
    whole = looked()
    folder("broken")
    Path("slow").touch()
    processes = started(words(what), ranks, free_port())
    limit = time.monotonic() + 300
    while not (Path("looked").exists() and looked() > whole // 3) and time.monotonic() < limit:
        time.sleep(0.01)
    for _ in range(1 if number == signal.SIGINT else 2):  # a scheduler repeats itself
        processes[-1].send_signal(number)
    for status, out, err in ended(processes):
        assert (status, out) == (130, "")
        assert err.endswith("dinokit: interrupted: the same command resumes\n")
        assert "Traceback" not in err
    assert looked() < whole
    Path("slow").unlink()
    again = ended(started(words(what), ranks, free_port()))
    assert [status for status, _, _ in again] == [0] * ranks, again
    assert scores(again[0][1]) == scores(alone[0][1])
    assert looked() < whole + 2 * 12
