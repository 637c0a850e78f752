"""Every evaluator on the emulated GPU, from images to scores: they are those of the CPU."""

from types import SimpleNamespace

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.features import Pooling, normalised
from dinokit.models import Input
from dinokit.train.health import Probe

GPU = torch.device("cuda:0")
IMAGES = {
    "train": {"name": "scenes", "split": "train"}, "test": {"name": "scenes", "split": "test"},
    "max_train": 60, "max_test": 40, "workers": 0, "precision": "fp32",
}  # fmt: skip
PAIRS = {**IMAGES, "max_train": 12, "max_test": 6}
WHOLE = {"size": 32, "resize": 32, "batch": 32}
HEAD = {"augment": False, "steps": 3, "batch": 4, "lr": 1e-3}
VIDEO = {"test": {"name": "scenes", "size": 64, "videos": 1, "frames": 4}, "size": 64, "precision": "fp32"}
TEST = {key: value for key, value in IMAGES.items() if "train" not in key}
ONLINE = {"mode": "online", "blocks": [1], "lr": [1e-3], "steps": 3, "step_batch": 8}
COPIES = {"features": "copy", "whiten": {"name": "scenes", "count": 40, "split": "train"}, "scales": [1, 0.5]}
JOINT = {"queries": 6, "blocks": 1, "points": 32, "steps": 3, "batch": 4}
WINDOWS = {"resize": 64, "crop": 32, "stride": 24}
CASES = {
    "knn": {**IMAGES, **WHOLE, "k": [5, 20], "few_shot": [2], "tries": 2},
    "linear": {**IMAGES, **WHOLE, "blocks": [1, 2], "lr": [1e-3, 1e-2], "steps": 5, "step_batch": 16},
    "linear, online": {**IMAGES, **WHOLE, **ONLINE},
    "attentive_probe": {**IMAGES, **WHOLE, "lr": [1e-3], "steps": 5, "step_batch": 16},
    "logreg": {**IMAGES, **WHOLE, "count": 2, "powers": [-2, 0], "iterations": 20},
    "position": {**IMAGES, **WHOLE, "rounds": 2},
    "retrieval": {**TEST, **WHOLE},
    "retrieval, copies": {**TEST, **WHOLE, **COPIES},
    "segmentation": {**PAIRS, **HEAD, **WINDOWS},
    "segmentation, ms": {**PAIRS, **HEAD, **WINDOWS, "method": "ms", "augment": True, "scales": [1, 1.5]},
    "segmentation, knn": {**PAIRS, "method": "knn", "resize": 64, "bank": 500},
    "segmentation, logreg": {**PAIRS, "method": "logreg", "resize": 64, "bank": 200, "c": [0.01, 1.0]},
    "eomt": {**PAIRS, **WINDOWS, **JOINT},
    "depth": {**PAIRS, **HEAD, "crop": [32, 32], "layers": 1, "bins": 16, "flip": True},
    "depth, dpt": {**PAIRS, **HEAD, "crop": [32, 32], "method": "dpt", "augment": True, "features": 16},
    "video": VIDEO,
    "correspondence": {"test": {"name": "scenes", "pairs": 2}, "precision": "fp32"},
    "discovery": {"test": IMAGES["test"], "max_test": 6, "precision": "fp32"},
}
QUICK = "knn", "linear", "segmentation, knn", "depth", "video"


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 4, "heads": 2, "patch": 8}
    made = registry.build("models", section).eval()
    for parameter in made.parameters():  # as after a training: no two images look alike
        torch.nn.init.normal_(parameter, std=0.2)
    made.input = Input(32, (0.5,) * 3, (0.2,) * 3)
    return made


def scores(name, values, backbone):
    module = registry.find("eval", name)
    return module.evaluate(module.Config(**section_values("eval", name, values, name)), backbone)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_an_evaluator_gives_the_scores_that_it_gives_on_the_cpu(emulated, backbone, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**34))
    name, values = case.split(",")[0], CASES[case]
    want = scores(name, values, backbone)
    with emulated():
        backbone.to(GPU)
        got = scores(name, values, backbone)
    assert got == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_the_probe_of_a_run_gives_the_signals_that_it_gives_on_the_cpu(emulated, backbone):
    source = registry.build("data.sources", {"name": "scenes", "count": 40, "split": "train"})
    want = Probe(source)(backbone)
    with emulated():
        got = Probe(source)(backbone.to(GPU))
    assert got == pytest.approx(want, rel=1e-4)


def test_images_are_normalised_and_seen_without_a_wait(emulated, backbone):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    want = normalised(backbone, images)
    with emulated() as gpu:
        crops = images.to(GPU)
        backbone.to(GPU)
        gpu.waits.clear()
        got = normalised(backbone, crops)
        Pooling(2, "mean")(backbone, got)
        assert gpu.waits == []
        torch.testing.assert_close(got.cpu(), want)
