"""The speed of a frozen backbone, as evaluators use it."""

from typing import Any

import torch

from dinokit.bench.machine import matmul_rates, measured_on, seconds, settled
from dinokit.config.load import Recipe
from dinokit.features.tokens import frozen, normalised
from dinokit.runtime.device import DTYPES
from dinokit.train.student_teacher import build_backbone


def bench_eval(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Images per second of the class token, from uint8 crops of the size of the global ones."""
    run = settled(recipe).run
    device, dtype = torch.device(run.device), DTYPES[run.precision]
    backbone = build_backbone(recipe).to(device).eval()
    size, batch = recipe.crops.globals.size, recipe.optim.batch
    crops = torch.randint(0, 256, (batch, backbone.channels, size, size), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with frozen(backbone), torch.inference_mode(), autocast:
        took = seconds(lambda: backbone([normalised(backbone, crops)], [None])[0].cls, device, rounds)
    return {
        **measured_on(run.device, run.precision),
        "images_per_second": batch / took,
        **matmul_rates(device),
    }
