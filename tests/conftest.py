"""What the tests share: one thread, the recorded numbers, small vits, images of noise."""

import contextlib
import json
import os
import random
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from dinokit.models.vit import Config, VisionTransformer
from dinokit.runtime.signals import STOP_SIGNALS

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A loaded machine is no failure, and two runs of one commit try the same examples.
settings.register_profile(
    "dinokit",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dinokit")

GOLDEN = Path(os.environ.get("DINOKIT_GOLDEN", Path(__file__).parent / "golden"))


def pytest_configure(config):
    """With other versions of the packages than those of constraints.txt, their warnings are no errors."""
    if os.environ.get("DINOKIT_VERSIONS", "tested") != "tested":
        config.addinivalue_line("filterwarnings", "default")


class Golden:
    """A recording: arrays by name, and the settings beside them."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        settings = GOLDEN / f"{name}.json"
        self.settings = json.loads(settings.read_text()) if settings.exists() else {}

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def get(self, key: str) -> torch.Tensor | None:
        return torch.from_numpy(np.asarray(self.arrays[key])) if key in self.arrays else None

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are left out where there is none; there, other libraries may warn of anything."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def free_port():
    """A function that gives a port for processes that meet.

    Linux gives the ports above to every connection that a program opens, so one of those that is free now may
    be taken before the processes have started.
    """

    def find():
        while True:
            port = random.SystemRandom().randrange(20_000, 32_700)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("localhost", port))
                return port

    return find


@pytest.fixture
def golden():
    return Golden


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def write_images():
    """write_images(folder, names, kinds, size, seed): images of noise, in a sub-folder for each kind."""

    def write(folder, names=("0.png", "1.png"), kinds=("red", "blue"), size=20, seed=0):
        rng = np.random.default_rng(seed)
        for kind in kinds:
            (folder / kind).mkdir(parents=True)
            for name in names:
                pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / kind / name)
        return folder

    return write


@pytest.fixture
def signals_given_back():
    """Restore signal handlers: after a stop signal a process ignores further ones."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def drawn():
    """The maker of small vits, drawn(registers=2): each tensor is drawn, so that each one counts."""
    torch.manual_seed(0)

    def make(**changes) -> VisionTransformer:
        defaults = {"size": 56, "patch": 14, "width": 128, "depth": 2, "heads": 2, "layer_scale": 1.0}
        vit = VisionTransformer(Config(**{**defaults, **changes})).eval().requires_grad_(False)
        for parameter in vit.parameters():
            parameter.normal_(std=0.2)
        return vit

    return make
