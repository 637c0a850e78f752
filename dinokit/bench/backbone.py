"""The speed of a backbone: its attention with each kernel, and the frozen network that evaluators use."""

from functools import partial
from typing import Any

import torch

from dinokit.bench.machine import matmul_rates, measured_on, seconds, settled
from dinokit.config.load import Recipe
from dinokit.features.tokens import frozen, normalised
from dinokit.models.attention import KERNELS, Attention, Kernel, PackedBatch, unavailable_reason
from dinokit.models.fused import attend
from dinokit.runtime.device import DTYPES
from dinokit.train.plan import tokens_per_crop
from dinokit.train.student_teacher import build_backbone


def bench_attention(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Milliseconds of one attention over all crops of a step, by kernel, or why there are none.

    Raises:
        ValueError: if the backbone has an attention of its own.
    """
    run = settled(recipe).run
    device, dtype = torch.device(run.device), DTYPES[run.precision] or torch.float32
    with torch.device("meta"):
        backbone = build_backbone(recipe)
    layers = [module for module in backbone.blocks.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(
            f"backbone.name={recipe.backbone['name']} has its own attention; there is no choice."
        )
    groups = [
        (recipe.optim.batch * group.count, tokens_per_crop(backbone, group.size))
        for group in (recipe.crops.globals, recipe.crops.locals)
        if group.count
    ]
    segments = PackedBatch(tuple(groups))
    rows = sum(images * tokens for images, tokens in groups)
    qkv = torch.randn(rows, 3 * backbone.width, device=device).to(dtype).requires_grad_()
    times: dict[str, Any] = {}
    for kernel in KERNELS:
        reason = unavailable_reason(kernel, device, dtype)
        work = partial(_run, qkv, layers[0].heads, segments, kernel)
        times[kernel] = reason or 1000 * seconds(work, device, rounds)
    return {
        **measured_on(run.device, run.precision),
        "milliseconds": times,
        "rows": rows,
        "width": backbone.width,
        **matmul_rates(device),
    }


def _run(qkv: torch.Tensor, heads: int, segments: PackedBatch, kernel: Kernel) -> None:
    qkv.grad = None
    attend(qkv, heads, segments, kernel).sum().backward()


def bench_eval(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Images per second of the class token, from uint8 crops of the size of the global ones."""
    run = settled(recipe).run
    device, dtype = torch.device(run.device), DTYPES[run.precision]
    backbone = build_backbone(recipe).to(device).eval()
    size, batch = recipe.crops.globals.size, recipe.optim.batch
    crops = torch.randint(0, 256, (batch, backbone.channels, size, size), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with frozen(backbone), torch.inference_mode(), autocast:
        elapsed = seconds(lambda: backbone([normalised(backbone, crops)], [None])[0].cls, device, rounds)
    return {
        **measured_on(run.device, run.precision),
        "images_per_second": batch / elapsed,
        **matmul_rates(device),
    }
