"""What the tests of attacks share: an end for what hangs, and weights of a small vit."""

import signal

import pytest

from dinokit.config import registry
from dinokit.weights import save_backbone

VIT = {"name": "vit", "width": 16, "depth": 1, "heads": 1, "size": 16, "patch": 8}


@pytest.fixture(autouse=True)
def _never_for_long():
    """End a test that hangs: many attacks are for that."""

    def stop(*_):
        raise TimeoutError("the attack made dinokit hang")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The path of a file of weights; nobody changes it."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_backbone(path, registry.build("models", VIT), VIT)
    return path
