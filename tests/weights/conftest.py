"""Every released architecture, for small vits."""

import pytest

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


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]
