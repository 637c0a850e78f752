"""What the machine itself can do."""

import time
from collections.abc import Callable
from statistics import median

import torch

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed


def seconds(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """The median time of `work`, s, the device having finished."""
    for _ in range(warm_up):
        work()
    return median(once(work, device) for _ in range(repeats))


def once(work: Callable[[], object], device: torch.device) -> float:
    """The time of one call of `work`, s, the device having finished."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product: the best of three, as the rest is lost to other programs."""
    side = SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return float(2 * side**3 / min(once(lambda: a @ b, device) for _ in range(3)))
