"""Commands that are killed, again and again, and run to their end; and what their folders then hold.

A command runs in a process that is forked from one which has imported torch and dinokit: only its start is
shorter than in a shell. DINOKIT_KILLS is the number of kills of a training; other commands get a fifth.
DINOKIT_KILLS_SEED chooses other moments.
"""

import contextlib
import csv
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LIFE = str(Path(__file__).parent / "life.py")
KILLS = int(os.environ.get("DINOKIT_KILLS", "5"))
SEED = int(os.environ.get("DINOKIT_KILLS_SEED", "0"))
LOG = logging.getLogger(__name__)  # pytest --log-cli-level=INFO shows the figures
PATIENCE = 300  # seconds for a life
PRELOAD = (
    "torch._dynamo", "torch._refs", "torch.distributed.checkpoint", "timm", "safetensors.torch",
    "dinokit.train.trainer", "dinokit.models.vit", "dinokit.features", "dinokit.evaluation", "dinokit.report",
    "dinokit.train.resources", "dinokit.train.health", "dinokit.eval.knn", "dinokit.eval.linear",
    "dinokit.weights.formats.native", "dinokit.curate.pipeline", "dinokit.prediction",
    "dinokit.commands.train", "dinokit.data.sources.folder", "dinokit.segment.training",
)  # fmt: skip
# What differs between two runs of one command that nothing disturbed: times, speeds, and the memory used.
TIMING = {"images_per_second", "data_wait", "memory_gib", "seconds", "time", "minutes", "speed"}
# Logs, the state of the machine, curves over minutes, a table that is there as CSV too, locks, and unfinished
# files of a killed process.
NOT_COMPARED = re.compile(r".*\.log|env\.json|curves\.(png|svg)|table\.md|\.lock.*|\..*\.lock|\..*\.part")


class Lives:
    """Runs commands in processes of their own.

    Args:
        folder: for what they print, and for the number of their changes of files.
    """

    def __init__(self, folder: Path, free_port) -> None:
        self.folder, self.number, self.free_port = folder, 0, free_port
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOAD))

    def start(self, cwd: Path, argv, at=None, group=False, number=signal.SIGKILL, **environment):
        """Start `dinokit ARGV` in the folder `cwd`. Gives the process, with `log` and `count`, paths.

        Before its change of a file number `at` it gets the signal, with its loader processes if `group`.
        """
        self.number += 1
        log, count = self.folder / f"{self.number}.txt", self.folder / f"{self.number}.count"
        life = {
            "argv": [*map(str, argv)], "cwd": str(cwd), "log": str(log), "count": str(count),
            "environment": {"DINOKIT_CACHE": str(cwd / "cache"), **environment},
            "at": at, "group": group, "signal": number,
        }  # fmt: skip
        process = self.context.Process(target=runpy.run_path, args=(LIFE, {"LIFE": life}, "__main__"))
        process.start()
        process.count, process.log = count, log
        return process

    def end(self, process, *expected: int) -> int:
        """The exit status, which must be an expected one; of a killed process it is minus the signal."""
        process.join(PATIENCE)
        late = process.exitcode is None
        if late:
            kill_group(process)
            process.join()
        assert not late, f"still running after {PATIENCE} s: {tail(process.log)}"
        assert process.exitcode in expected, f"{process.exitcode}: {tail(process.log)}"
        return process.exitcode

    def run(self, cwd: Path, argv, **environment) -> int:
        """Run a command to its end, which must be a good one. Gives the number of its changes of files."""
        process = self.start(cwd, argv, **environment)
        self.end(process, 0)
        return int(process.count.read_text())


def kill_group(process, number=signal.SIGKILL) -> None:
    """Send a signal to a life and its loader processes at once."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it has not made its group yet, or has ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def processes_below(folder: Path, seconds: float = 20.0) -> list[str]:
    """Processes that work below a folder, once they had time to see that the one above them is gone."""
    end = time.monotonic() + seconds
    while (found := _working_below(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _working_below(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(f"{process.name} {(process / 'cmdline').read_text()[:200]}")
    return found


class Scenario:
    """Commands, one after another, whose files after kills must be those of an undisturbed run.

    Args:
        lives: starts processes.
        folder: for the working folders of the commands.
        commands: the words of each; paths of what they write are relative.
        environment: of all.
    """

    def __init__(self, lives: Lives, folder: Path, *commands, **environment) -> None:
        self.lives, self.folder, self.commands, self.environment = lives, folder, commands, environment
        self.kills = self.unhurt = self.rounds = 0  # unhurt: lives that ended before the kill came
        self.places: list[str] = []
        self.whole = self.new("whole")
        self.changes, self.seconds = [], []
        for argv in commands:
            begin = time.monotonic()
            self.changes.append(lives.run(self.whole, argv, **environment))
            self.seconds.append(time.monotonic() - begin)

    def new(self, name: str) -> Path:
        """A new working folder."""
        cwd = self.folder / name
        cwd.mkdir()
        return cwd

    def kill(self, kills: int, most: int = 8) -> None:
        """Kill each command `kills` times, `most` times at most before it may end; compare after each end."""
        rng = random.Random(SEED)
        for number, argv in enumerate(self.commands):
            until = self.kills + kills
            while self.kills < until:
                cwd = self.new(f"broken{self.rounds}")
                for before in self.commands[:number]:
                    self.lives.run(cwd, before, **self.environment)
                for life in range(min(until - self.kills, rng.randint(1, most))):
                    if not self._life(cwd, argv, number, rng, 1 / (life + 1)):
                        break
                for after in self.commands[number:]:
                    self.lives.run(cwd, after, **self.environment)
                self.compare(cwd)
                shutil.rmtree(cwd)
                self.rounds += 1
        LOG.info(
            f"{self.kills} kills in {self.rounds} rounds, {self.unhurt} lives ended before: {self.places}"
        )
        assert not processes_below(self.folder)

    def _life(self, cwd: Path, argv, number: int, rng: random.Random, share: float) -> bool:
        """One life with a kill, before a change of a file or at a moment, alone or with loader processes.

        The kill comes in the first `share` of the changes, or of the time, that an undisturbed run takes.
        Returns whether it came before the end.
        """
        group = rng.random() < 0.5
        if rng.random() < 0.6:
            at = rng.randint(1, max(round(self.changes[number] * share), 1))
            process = self.lives.start(cwd, argv, at, group, **self.environment)
            place = f"{at}/{self.changes[number]}"
        else:
            moment = rng.random() * self.seconds[number] * share
            process = self.lives.start(cwd, argv, **self.environment)
            process.join(moment)
            (kill_group if group else type(process).kill)(process)
            place = f"{moment:.2f}/{self.seconds[number]:.2f} s"
        status = self.lives.end(process, 0, -signal.SIGKILL)
        self.kills += bool(status)
        self.unhurt += not status
        self.places.append(place)
        return bool(status)

    def compare(self, cwd: Path, without: str = "") -> None:
        """Compare what is in two working folders, but for names that begin with `without`, if given."""
        whole, other = contents(self.whole, without), contents(cwd, without)
        assert whole, f"{self.whole} has no file to compare"
        names = sorted(n for n in whole | other if whole.get(n) != other.get(n))
        assert not names, f"{names} after {self.places[-6:]}: compare {self.whole} and {cwd}"


def contents(folder: Path, without: str = "") -> dict[str, str]:
    """A digest of each file below a folder, without times, speeds, logs and hidden temporary files.

    Names that begin with `without`, if given, are left out.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        name = "/".join(parts)
        left_out = without and name.startswith(without)
        if path.is_file() and not left_out and not any(NOT_COMPARED.fullmatch(part) for part in parts):
            found[name] = hashlib.sha256(_content(path)).hexdigest()
    return found


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".safetensors":  # the order of metadata in the file is random, in every process
        size = int.from_bytes(content[:8], "little")
        return (
            json.dumps(_plain(json.loads(content[8 : 8 + size])), sort_keys=True).encode()
            + content[8 + size :]
        )
    if path.name == "complete.json":  # it has the checksum of such a file
        return json.dumps(_plain(json.loads(content), {"sha256"}), sort_keys=True).encode()
    if path.name == "done.json":  # of a stage of a curation: also the size of a page that shows times
        return json.dumps(_plain(json.loads(content), {"bytes"})).encode()
    if path.suffix == ".html" and (path.parent / "stages").is_dir():
        return re.sub(rb"<td class=n>[\d.]+</td>", b"", content)  # the seconds of the stages of a curation
    if path.name == "table.csv":  # of a sweep: without the minutes, and the scores after so many
        rows = csv.DictReader(content.decode().splitlines())
        return json.dumps([{k: v for k, v in row.items() if "min" not in k} for row in rows]).encode()
    if path.suffix == ".json":
        return json.dumps(_plain(json.loads(content))).encode()
    if path.suffix == ".jsonl":
        lines = [json.dumps(_plain(json.loads(line))) for line in content.decode().splitlines()]
        # A kill between the line and the end makes an equal line: of such lines the last one counts.
        return "\n".join(dict.fromkeys(lines) if path.name == "results.jsonl" else lines).encode()
    return content


def _plain(x, without=frozenset()):
    """JSON without times; texts that are JSON objects are read too."""
    if isinstance(x, dict):
        return {key: _plain(value, without) for key, value in x.items() if key not in TIMING | without}
    if isinstance(x, str) and x.startswith("{"):
        with contextlib.suppress(ValueError):
            return _plain(json.loads(x), without)
    return [_plain(each, without) for each in x] if isinstance(x, list) else x


@pytest.fixture(scope="session")
def lives(tmp_path_factory, free_port):
    return Lives(tmp_path_factory.mktemp("lives"), free_port)


@pytest.fixture(scope="module")
def scenario(lives, tmp_path_factory):
    """scenario(words, ..., NAME=VALUE of the environment): see Scenario."""
    folder = tmp_path_factory.mktemp("scenarios")

    def make(*commands, **environment):
        below = folder / str(len(list(folder.iterdir())))
        below.mkdir()
        return Scenario(lives, below, *commands, **environment)

    yield make
    for text in _working_below(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(text.split()[0]), signal.SIGKILL)


@pytest.fixture
def kills():
    """How often a training is killed."""
    return KILLS


@pytest.fixture
def fewer():
    """How often each of the other commands is killed."""
    return max(KILLS // 5, 1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 24 images in two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(24):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) // (1 + i % 2)
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.kron(small, np.ones((8, 8, 1), np.uint8))).save(
            folder / "ab"[i % 2] / f"{i:02d}.png"
        )
    return folder


RECIPE = """
backbone: {name: vit, size: 32, width: 24, depth: 2, heads: 2, patch: 8, layer_scale: 1.0, drop_path: 0.2}
heads: {cls: {prototypes: 32, hidden: 32, bottleneck: 16}}
losses: {dino: {}, ibot: {}, koleo: {}}
teacher: {momentum: [0.9, 1.0], temp: [0.04, 0.07], temp_warmup: 4}
crops: {globals: {count: 2, size: 32}, locals: {count: 2, size: 16}}
masks: {images: 0.5, patches: [0.2, 0.5]}
optim: {steps: 8, batch: 2, lr: 1e-3, lr_rule: none, warmup: 2}
data: {name: folder, path: PHOTOS}
evals: {knn: {every: 4, k: [3], size: 32, resize: 32, workers: 0, overlap: allow,
              train: {path: PHOTOS, labels: folders}, test: {path: PHOTOS, labels: folders}}}
run: {precision: fp32, device: cpu, workers: 1, log_every: 1, checkpoint_every: 2, keep: 2, keep_every: 4,
      report: false}
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, photos):
    """The path of a recipe of a run that takes a second."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(RECIPE.replace("PHOTOS", str(photos)))
    return path


@pytest.fixture(scope="session")
def trained(lives, recipe):
    """The folder of a finished run."""
    folder = lives.folder / "trained"
    folder.mkdir()
    lives.run(folder, ["train", recipe, "run.out=run"])
    return folder / "run"
