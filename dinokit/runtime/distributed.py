"""Processes that work together: rank, number, and collectives, which do nothing in a single process.

Inside part() they are about the processes of one part of those that were started; functions with `everyone`
in their name still are about all.

The only file that reads environment variables: those of torchrun and of SLURM.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_group: Any = None  # of the processes that work together; None: all that were started
_timeout: timedelta | None = None  # of connect(); torch gives a new group half an hour, not that of the first
FIRST_PORT, PORTS = 12_000, 18_000  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that a launcher started together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those on this node
    local_world: int = 1
    address: str = "localhost"  # of the node with rank 0
    port: int = 0
    by: str = "alone"  # launcher: torchrun, SLURM or alone

    @property
    def nodes(self) -> int:
        """The number of nodes if all have equally many processes, else 1."""
        return 1 if self.world % self.local_world else self.world // self.local_world


def launch() -> Launch:
    """Read the launcher's environment variables. A batch script's own process, outside srun, is alone.

    Raises:
        ValueError: if some of torchrun's variables are missing.
    """
    env = os.environ
    if "RANK" in env:
        absent = [key for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in env]
        if absent:
            raise ValueError(
                f"RANK={env['RANK']} is set, but not {', '.join(absent)}. Start with torchrun or srun, which "
                f"set all of them, or unset RANK to train in one process."
            )
        world = int(env["WORLD_SIZE"])
        return Launch(
            int(env["RANK"]), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", world)),
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), "torchrun",
        )  # fmt: skip
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone
        world = int(env["SLURM_STEP_NUM_TASKS"])
        job = 7 * int(slurm_job_id() or 0) + int(env.get("SLURM_STEP_ID", 0))
        return Launch(
            int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", 0)),
            _tasks_here(env.get("SLURM_STEP_TASKS_PER_NODE", str(world)), int(env.get("SLURM_NODEID", 0))),
            env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
            int(env.get("MASTER_PORT") or FIRST_PORT + job % PORTS), "SLURM",
        )  # fmt: skip
    return Launch()


@contextmanager
def torchrun_variables() -> Iterator[None]:
    """Give processes that srun started the variables of torchrun, for libraries that read no others."""
    ours, before = launch(), dict(os.environ)
    if ours.by == "SLURM":
        os.environ |= {
            "RANK": f"{ours.rank}", "WORLD_SIZE": f"{ours.world}", "LOCAL_RANK": f"{ours.local_rank}",
            "LOCAL_WORLD_SIZE": f"{ours.local_world}", "MASTER_ADDR": ours.address,
            "MASTER_PORT": f"{ours.port}",
        }  # fmt: skip
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


def slurm_job_id() -> str:
    """The id of this process's SLURM job; empty outside of a job."""
    return os.environ.get("SLURM_JOB_ID", "")


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: gpu03 of 'gpu[03-05,9],cpu1'."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _tasks_here(counts: str, node: int) -> int:
    """Tasks of a node from SLURM's counts: '4(x2),3' is 4, 4 and 3."""
    each: list[int] = []
    for group in counts.split(","):
        count, _, times = group.rstrip(")").partition("(x")
        each += [int(count)] * int(times or 1)
    return each[node] if node < len(each) else each[0]


def cpu_cores() -> int:
    """CPU cores for this process: those it may use, divided by the processes on its node."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = launch()
    if ours.by == "SLURM" and os.environ.get("SLURM_CPUS_PER_TASK"):
        return min(have, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(have // ours.local_world, 1)


def memory() -> int:
    """Bytes of main memory for this process: the share of machine or container."""
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return (min(have, int(text)) if text.isdecimal() else have) // launch().local_world


def connect(backend: str, store: Any, number: int, world: int, timeout: timedelta) -> None:
    """Connect the processes that were started; this group and those made later wait `timeout` for others."""
    global _timeout
    _timeout = timeout
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout)


def world_size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size(_group) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0. Process 0 writes files."""
    return dist.get_rank(_group) if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def part(parts: Sequence[Sequence[int]]) -> Iterator[None]:
    """For the length of the block, the processes of each part work together, and not with the others.

    All processes enter it, with the same `parts`: the ranks of each, every process in one.
    """
    global _group
    ours = dist.get_rank()
    groups = [dist.new_group(list(ranks), timeout=_timeout) for ranks in parts]
    _group = next(group for group, ranks in zip(groups, parts, strict=True) if ours in ranks)
    try:
        yield
    finally:
        _group = None


def group() -> Any:
    """The process group of part(); None outside, for all processes."""
    return _group


def new_cpu_group() -> Any:
    """Another group of the processes that work together, for tensors on CPUs. All of them call it."""
    if _group is None:
        return dist.new_group(backend="gloo", timeout=_timeout)
    ranks = dist.get_process_group_ranks(_group)
    return dist.new_group(ranks, _timeout, "gloo", use_local_synchronization=True)


def max_of_everyone(x: Tensor) -> Tensor:
    """The elementwise largest x over all processes that were started. Changes x in place; no gradient."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_from_everyone(x: Tensor) -> Tensor:
    """The x (...) of all W processes that were started, in order of rank: (W, ...). No gradient."""
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.contiguous())
    return torch.stack(rows)


def objects_of_everyone(x: Any) -> list[Any]:
    """gather_objects() over all processes that were started."""
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, x)
    return objects


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes. Changes x in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x, group=_group)
    return x


def all_reduce_max(x: Tensor) -> Tensor:
    """The elementwise largest x over all processes. Changes x in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_group)
    return x


def cache_folder() -> Path:
    """Folder of cached features: `features` in DINOKIT_CACHE or in ~/.cache/dinokit."""
    return Path(os.environ.get("DINOKIT_CACHE") or Path.home() / ".cache" / "dinokit") / "features"


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate rows (B, ...) of all processes by rank: (world * B, ...). B is equal everywhere.

    Differentiable: each process gets the gradient of its own rows, summed over processes.
    """
    return _AllGatherRows.apply(x) if world_size() > 1 else x


def gather_objects(x: Any) -> list[Any]:
    """The x of every process, in order of rank, in every process. Waits for all processes."""
    if world_size() == 1:
        return [x]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, x, group=_group)
    return objects


def broadcast(x: Any) -> Any:
    """The x of process 0, in every process. Waits for process 0."""
    if world_size() == 1:
        return x
    objects = [x]
    dist.broadcast_object_list(
        objects, src=0 if _group is None else dist.get_global_rank(_group, 0), group=_group
    )
    return objects[0]


# A DTensor is recognised by its methods, because importing its class takes half a second and 40 MiB.


def local(x: Tensor) -> Tensor:
    """The local shard of a sharded tensor; another tensor unchanged."""
    return x.to_local() if hasattr(x, "to_local") else x


def full(x: Tensor) -> Tensor:
    """A sharded tensor gathered in every process; another tensor unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous(), group=_group)
        return torch.cat(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous().clone()).chunk(world_size())[rank()]
