"""What is summed over processes. With one process there is no group, and every sum here is the identity."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those on this node


def launch() -> Launch:
    """What torchrun, srun or nobody says."""
    env = os.environ
    if "RANK" in env:
        return Launch(int(env["RANK"]), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone
        return Launch(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    return Launch()


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; process 0 writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes. Changes x in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(x: Tensor) -> Tensor:
    """The elementwise largest x over all processes. Changes x in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def launched() -> int:
    """The number of processes that torchrun or another launcher started together with this one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def cache_folder() -> Path:
    """Where features are kept between commands: DINOKIT_CACHE, or a folder of the user's."""
    return Path(os.environ.get("DINOKIT_CACHE") or Path.home() / ".cache" / "dinokit" / "features")
