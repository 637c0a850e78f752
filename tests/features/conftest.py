"""A folder of photos of many shapes, and a small backbone with registers."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.models import Input
from dinokit.weights import save_backbone

SECTION = {
    "name": "vit", "size": 32, "width": 24, "depth": 3, "heads": 2, "patch": 8, "layer_scale": 1.0,
    "registers": 2,
}  # fmt: skip


@pytest.fixture
def vit():
    torch.manual_seed(0)
    backbone = registry.build("models", SECTION)
    backbone.input = Input(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    for block in backbone.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return backbone.eval()


@pytest.fixture
def vit_file(vit, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_backbone(path, vit, SECTION)
    return path


@pytest.fixture
def photos(tmp_path):
    """make(count, *broken): a folder of photos of different shapes, some of them damaged."""

    def make(count, *broken):
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for i in range(count):
            shape = (*rng.integers(20, 60, 2), 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:04d}.png")
        for i in broken:
            (folder / f"{i:04d}.png").write_bytes(b"\x89PNG and then nothing")
        return folder

    return make
