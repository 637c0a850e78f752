"""How much memory a process has held."""

import resource

import torch


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most: on a GPU, or in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_share(device: torch.device) -> float:
    """peak_memory() over what the GPU has; 0 where there is none."""
    if device.type != "cuda":
        return 0.0
    return peak_memory(device) * 2**30 / torch.cuda.get_device_properties(device).total_memory
