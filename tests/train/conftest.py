"""A run small enough to be done in seconds."""

import json
import multiprocessing
import runpy
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.train import trainer
from dinokit.train.step import Step

TINY = """
backbone: {name: vit, size: 32, width: 24, depth: 2, heads: 2, patch: 8, layer_scale: 1.0, drop_path: 0.2}
heads: {cls: {prototypes: 32, hidden: 32, bottleneck: 16}}
losses: {dino: {}, ibot: {}, koleo: {}}
teacher: {momentum: [0.9, 1.0], temp: [0.04, 0.07], temp_warmup: 4}
crops: {globals: {count: 2, size: 32}, locals: {count: 2, size: 16}}
masks: {images: 0.5, patches: [0.2, 0.5]}
optim: {steps: 6, batch: 4, lr: 1e-3, lr_rule: none, warmup: 2}
data: {name: folder, path: "???"}
run: {precision: fp32, workers: 0, log_every: 1, checkpoint_every: 2}
"""


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = np.kron(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny(recipe_file, photos, tmp_path):
    """load(*overrides): the recipe of a run into tmp_path/NAME."""

    def load(out, *overrides):
        return load_recipe(recipe_file, [f"data.path={photos}", f"run.out={tmp_path / out}", *overrides])

    return load


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there, and their most."""

    def __init__(self):
        super().__init__()
        self.size, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.size:
                self.size[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._ended, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _ended(self, key):
        self.now -= self.size.pop(key)


@pytest.fixture
def living():
    """The mode that counts bytes: with living() as it: ...; it.now, it.most."""
    return Living


def read_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "teacher.safetensors")


def read_records(out: Path) -> list[dict]:
    timing = {"images_per_second", "data_wait", "memory_gib"}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert read_records(a) == read_records(b)
    one, two = read_weights(a), read_weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def weights():
    return read_weights


@pytest.fixture
def records():
    return read_records


@pytest.fixture
def same_run():
    return assert_same_run


@pytest.fixture
def saved():
    """saved(checkpoint): the model in a checkpoint of one process, by name."""

    def read(path):
        (shard,) = path.glob("shard-*")
        tensors = load_file(shard)
        return {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}

    return read


SCENARIOS = str(Path(__file__).parent / "scenarios.py")
RACES = "Address already in use", "EADDRINUSE", "Connection refused"  # of two programs that start at once


class Together:
    """Several processes that were started together, as a launcher would."""

    def __init__(self, log: Path, free_port) -> None:
        self.log, self.free_port = log, free_port
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["dinokit.train.trainer", "dinokit.models.vit"])

    def start(self, world: int, job: str, *arguments: object) -> list:
        port, processes = str(self.free_port()), []
        for rank in range(world):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            }  # fmt: skip
            given = {"ENVIRONMENT": environment, "JOB": (job, arguments), "LOG": str(self.log)}
            process = self.context.Process(target=runpy.run_path, args=(SCENARIOS, given, "__main__"))
            process.start()
            processes.append(process)
        return processes

    def end(self, processes: list, seconds: float = 300) -> list[int]:
        """Their exit statuses."""
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"still running after {seconds} s: {self.output()}"
        return [process.exitcode for process in processes]

    def __call__(self, world: int, job: str, *arguments: object, status: tuple = (0,)) -> str:
        """Run to the end, with one more try after a race at the start. Returns what was written to stderr."""
        for again in (True, False):
            self.log.write_text("")
            got = self.end(self.start(world, job, *arguments))
            if not (again and any(race in self.output() for race in RACES)):
                break
        assert set(got) <= set(status), f"{got}: {self.output()}"
        return self.output()

    def output(self) -> str:
        return self.log.read_text()


@pytest.fixture
def together(tmp_path, free_port):
    return Together(tmp_path / "stderr.txt", free_port)


@pytest.fixture
def cut_short(monkeypatch):
    """cut_short(recipe): a run that ends after its fourth step, as when it is interrupted."""

    def run(recipe):
        real = Step.__call__

        def step(self, batch):
            if batch.step == 4:
                raise KeyboardInterrupt
            return real(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", step)
            with pytest.raises(KeyboardInterrupt):
                trainer.train(recipe, registry.build("data.sources", recipe.data))

    return run
