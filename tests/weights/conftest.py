"""Small vits of every released architecture, each tensor drawn so that each one counts."""

import pytest
import torch

from dinokit.backbones.vit import Config, VisionTransformer

NO_SCALE = {"layer_scale": 0.0, "mask_token": False}
REGISTERS = {"registers": 4, "pos_offset": 0.0, "pos_antialias": True}
# The table of released models (arXiv 2104.14294, 2304.07193, 2309.16588), with smaller widths and depths.
ARCHITECTURES = {
    "DINO, patch 16": {"patch": 16, "size": 64, **NO_SCALE},
    "DINO, patch 8": {"patch": 8, "size": 32, **NO_SCALE},
    "DINOv2": {},
    "DINOv2 with registers": REGISTERS,
    "DINOv2 giant": {"ffn": "swiglu", "width": 192, "heads": 3},
    "DINOv2 giant with registers": {"ffn": "swiglu", "width": 192, "heads": 3, **REGISTERS},
}


@pytest.fixture
def drawn():
    """The maker of a vit: drawn(registers=2)."""
    torch.manual_seed(0)

    def make(**changes) -> VisionTransformer:
        defaults = {"size": 56, "patch": 14, "width": 128, "depth": 2, "heads": 2, "layer_scale": 1.0}
        vit = VisionTransformer(Config(**{**defaults, **changes})).eval().requires_grad_(False)
        for parameter in vit.parameters():
            parameter.normal_(std=0.2)
        return vit

    return make


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]
