"""Where and in which precision a run computes, and how much memory its process uses."""

import ctypes
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from dinokit.config.recipe import Run

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def pick_device(name: str) -> torch.device:
    """The device of `run.device`.

    Raises:
        ValueError: if there is no such device here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, usable in available.items() if usable))
    if not available.get(name.split(":", maxsplit=1)[0], False):
        listed = ", ".join(kind for kind, usable in available.items() if usable)
        raise ValueError(f"There is no device {name} here; there is: {listed}. auto takes the first.")
    return torch.device(name)


def pick_precision(name: Precision | Literal["auto"], device: torch.device) -> Precision:
    """The precision of `run.precision`; auto is bf16 where the device multiplies faster in it, else fp32.

    On CUDA without bf16, auto is fp16. The speed of a CPU is measured once in a process.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _multiplies_faster(torch.bfloat16, torch.float32) else "fp32"


@cache
def _multiplies_faster(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether a CPU core multiplies matrices faster in one dtype than in another.

    Measured, because the instruction set does not decide it: with AVX-512-BF16 and without AMX, bf16 had
    twice the rate of fp32 on an AMD EPYC and half of it on an Intel Xeon. The time is CPU time of one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # In turn, so that a moment when others use the core slows both.
        pairs = [(_seconds_of_product(one), _seconds_of_product(other)) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    first, second = zip(*pairs, strict=True)
    return min(first) < min(second)


def _seconds_of_product(dtype: torch.dtype) -> float:
    x = torch.ones(384, 384, dtype=dtype)
    start = time.thread_time()
    torch.mm(x, x)
    return time.thread_time() - start


def keep_freed_memory(run: Run) -> None:
    """With `run.keep_memory` on a CPU with glibc, keep the memory that a step frees for the next step.

    glibc returns large blocks to the kernel at once, which hands them out again page by page, each filled
    with zeros: a fifth of the time of a step. Elsewhere this does nothing.
    """
    if not run.keep_memory or pick_device(run.device).type != "cpu" or not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        max_fast, trim_threshold, mmap_max = 1, -1, -4  # from malloc.h
        library.mallopt(max_fast, 0)  # small free blocks are merged with their neighbours
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, -1)  # never


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on a CUDA device, or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:  # Linux; ru_maxrss would include the program before exec
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    resource = import_module("resource")  # Windows has none
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30)


def memory_share(device: torch.device) -> float:
    """peak_memory() as a share of the GPU's memory; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    return peak_memory(device) * 2**30 / torch.cuda.get_device_properties(device).total_memory
