"""Training a head on frozen features: AdamW, a schedule by step, and a training that was killed goes on."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.backbones import Backbone
from dinokit.distributed import all_reduce_sum, rank, world_size
from dinokit.eval._look import progress
from dinokit.features import Map
from dinokit.files import atomic

Shown = tuple[list[Map], Tensor]  # what a step is shown: maps of features, and the truth (b, H, W)
SAVED = "head.ckpt"


@dataclass(frozen=True)
class Plan:
    """How a head is trained."""

    steps: int
    lr: float  # peak
    weight_decay: float  # of matrices and kernels alone
    factor: Callable[[int], float]  # of the learning rate, by the number of steps done
    clip: float  # largest gradient norm; 0 is off
    out: str  # folder of the saved state; "" saves none
    save_every: int  # steps
    identity: str  # what must be the same for a saved state to go on from


def poly(steps: int, warmup: int, ratio: float = 1e-6) -> Callable[[int], float]:
    """A line from 1 to 0, times one from `ratio` to 1 over the first `warmup` steps."""
    return lambda step: (1 - step / steps) * _warm(step, warmup, ratio)


def cosine(steps: int, warmup: int, ratio: float = 1e-3, end: float = 1e-8) -> Callable[[int], float]:
    """A half cosine from 1 to `end`, times a line from `ratio` to 1 over the first `warmup` steps."""
    return lambda step: (
        (end + (1 - end) * (1 + math.cos(math.pi * step / steps)) / 2) * _warm(step, warmup, ratio)
    )


def fit(
    head: nn.Module,
    shown: Callable[[int], Iterator[Shown]],
    loss: Callable[[list[Map], Tensor, int], Tensor],
    plan: Plan,
) -> None:
    """Train `head`, in place, and leave it in eval mode.

    Args:
        head: on the device to compute on, equal in all processes.
        shown: what the steps from a given one on are shown, in this process.
        loss: of maps and truth at a step, (); it calls the head.
        plan: see there.

    Raises:
        ValueError: if the loss is not finite, or a saved state is of another training.
    """
    kernels = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, plan.lr, weight_decay=plan.weight_decay)
    head.train()
    start = done = _load(head, optimizer, plan)
    steps = progress(shown(start), "train head", plan.steps, start) if start < plan.steps else iter(())
    try:
        for maps, truth in steps:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * plan.factor(done)
            value = loss(maps, truth, done)
            if not value.isfinite():
                raise ValueError(
                    f"The loss of step {done} is {value.item()}: the features are not finite, or "
                    f"lr={plan.lr} is too high."
                )
            optimizer.zero_grad()
            value.backward()
            _average(head)
            if plan.clip:
                nn.utils.clip_grad_norm_(head.parameters(), plan.clip)
            optimizer.step()
            done += 1
            if done % plan.save_every == 0:
                _save(head, optimizer, plan, done)
    finally:
        if done > start:
            _save(head, optimizer, plan, done)  # after Ctrl-C too
    _average_buffers(head)
    head.eval()


def fingerprint(backbone: Backbone) -> str:
    """A number that other weights would hardly have."""
    assert isinstance(backbone, nn.Module)
    sums = [tensor.double().sum().item() for tensor in backbone.state_dict().values()]
    return f"{sum((i + 1) * value for i, value in enumerate(sums)):.12g}"


def identity(values: dict[str, Any], backbone: Backbone) -> str:
    """What a training is: its settings, but for those that change nothing that is learnt, and the weights."""
    free = ("out", "save_every", "workers", "test", "max_test")
    kept = {key: value for key, value in values.items() if key not in free}
    return json.dumps({**kept, "weights": fingerprint(backbone)}, sort_keys=True, default=list)


def _warm(step: int, warmup: int, ratio: float) -> float:
    return 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)


def _save(head: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, step: int) -> None:
    if plan.out and rank() == 0:
        state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic(Path(plan.out) / SAVED) as part:
            torch.save({"step": step, "identity": plan.identity, **state}, part)


def _load(head: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> int:
    path = Path(plan.out) / SAVED
    if not plan.out or not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken zip, a foreign pickle, a short read: each has its own type
        raise ValueError(f"{path} cannot be read ({error}). Move it away to begin anew.") from None
    if state["identity"] != plan.identity:
        old, new = json.loads(state["identity"]), json.loads(plan.identity)
        other = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        raise ValueError(
            f"{path} is of a training with other settings ({', '.join(sorted(other))}). Give another `out`, "
            f"or move it away."
        )
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _average(head: nn.Module) -> None:
    """Gradients over all processes: one sum of all of them, laid end to end."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    total = all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / world_size()
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _average_buffers(head: nn.Module) -> None:
    """Batch statistics are those of each process; what is judged is their mean, the same everywhere."""
    for buffer in head.buffers():
        if buffer.is_floating_point():
            buffer.copy_(all_reduce_sum(buffer.clone()) / world_size())
