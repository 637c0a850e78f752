"""Measures steps, the data path, attention and evaluation, beside the machine's rate of matrix products."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from dinokit.config.load import Recipe
from dinokit.runtime.device import pick_device, pick_precision

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed
SLOW = 5.0  # seconds: a product that would take longer is not timed
RATES = {"matmul_fp32": torch.float32, "matmul_bf16": torch.bfloat16}


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the device and the precision that `auto` is here.

    Raises:
        ValueError: if there is no such device here.
    """
    device = pick_device(recipe.run.device)
    precision = pick_precision(recipe.run.precision, device)
    return replace(recipe, run=replace(recipe.run, device=str(device), precision=precision))


def measured_on(device: str, precision: str) -> dict[str, Any]:
    """For a report: these two, and the threads that this process computes with."""
    return {"device": device, "precision": precision, "threads": torch.get_num_threads()}


def seconds(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """The median time of `work`, s, the device having finished."""
    for _ in range(warm_up):
        work()
    return median(once(work, device) for _ in range(repeats))


def once(work: Callable[[], object], device: torch.device) -> float:
    """The time of one call of `work`, s, the device having finished."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each column."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def matmul_rates(device: torch.device) -> dict[str, float]:
    """matmul_rate() by the name that it has in reports."""
    return {name: matmul_rate(dtype, device) for name, dtype in RATES.items()}


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product: the best of three, as the rest is lost to other programs.

    Only a small product is timed where the large one would take minutes: bf16 on a CPU without it.
    """
    large = SIDE.get(device.type, 2048)
    for side in (256, large):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(once(lambda: a @ b, device) for _ in range(3))  # noqa: B023
        if seconds * (large / side) ** 3 > SLOW:
            break
    return float(2 * side**3 / seconds)
