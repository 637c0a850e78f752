"""What only a GPU does with language on frozen features: docs/gpu.md lists the branches."""

import json

import numpy as np
import pytest
import torch

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.eval.attentive_probe import _check_memory
from dinokit.language.aligned import load_aligned

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.gpu

RAW = "backbone: {name: raw_patches, size: 32, patch: 8, cell: 4}\n"
ALIGN = RAW + (
    "data: {name: captioned, size: 32, count: 64}\nhead: {width: 32, depth: 1, heads: 2, embedding: 32}\n"
    "text: {width: 32, depth: 1, heads: 2}\noptim: {steps: 4, batch: 16, warmup: 1}\nrun: {log_every: 1}\n"
)
INSTRUCT = RAW + (
    "language: {width: 32, depth: 2, heads: 2, hidden: 48}\ndata: {name: captioned, size: 32}\n"
    "stages: {only: {steps: 4, batch: 8, lr: 1e-3}}\nrun: {log_every: 1}\n"
)


def losses(tmp_path, command, text, device):
    """Of a run on a device."""
    (tmp_path / "small.yaml").write_text(text)
    out = tmp_path / device
    assert main([command, str(tmp_path / "small.yaml"), f"out={out}", f"device={device}"]) == 0
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_an_alignment_on_the_card_is_that_of_the_cpu(tmp_path):
    on_cpu, on_card = (losses(tmp_path, "align", ALIGN, device) for device in ("cpu", "cuda"))
    assert on_card == pytest.approx(on_cpu, rel=2e-2)  # tokens of a card are computed in bf16
    backbone = registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4})
    images = [np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)]
    here = load_aligned(tmp_path / "cpu", backbone).image(images)
    there = load_aligned(tmp_path / "cpu", backbone.cuda()).image(images).cpu()
    torch.testing.assert_close(there, here, rtol=0, atol=2e-2)


def test_a_model_that_answers_trains_on_one_card_as_on_the_cpu(tmp_path):
    on_cpu, on_card = (losses(tmp_path, "instruct", INSTRUCT, device) for device in ("cpu", "cuda"))
    assert on_card == pytest.approx(on_cpu, rel=1e-3)


def test_patches_are_compared_with_the_memory_of_the_card():
    images = torch.cuda.get_device_properties(0).total_memory // (4 * 2**20)
    with pytest.raises(ValueError, match=r"there are .* GiB, enough for"):
        _check_memory(images, 2**20, torch.device("cuda"))
