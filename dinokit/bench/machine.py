"""What the machine itself can do, and what a process takes of it."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
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


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product: the best of three, as the rest is lost to other programs."""
    side = SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return float(2 * side**3 / min(once(lambda: a @ b, device) for _ in range(3)))


def peak_memory(device: torch.device) -> float:
    """GiB that this process held at most: on the device, or in memory if that is the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    status = Path("/proc/self/status")
    if status.exists():  # the other count has what the process was before it ran this program
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
