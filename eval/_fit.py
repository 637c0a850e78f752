"""Training a head on frozen features: AdamW, a schedule by step, and a training that was killed goes on."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.eval._resume import Resume
from dinokit.features import Map
from dinokit.runtime.distributed import all_reduce_sum, world_size
from dinokit.runtime.log import watch

Shown = tuple[list[Map], Tensor]  # what a step is shown: maps of features, and the truth (b, H, W)


@dataclass(frozen=True)
class Plan:
    """How a head is trained."""

    steps: int
    lr: float  # peak
    weight_decay: float  # of matrices and kernels alone
    factor: Callable[[int], float]  # of the learning rate, by the number of steps done
    clip: float  # largest gradient norm; 0 is off
    resume: Resume  # the state to go on from; the last one stays until the scores are there
    save_every: int  # steps


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
        ValueError: if the loss is not finite.
    """
    kernels = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, plan.lr, weight_decay=plan.weight_decay)
    head.train()
    state = plan.resume.load()
    if state is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    start = done = 0 if state is None else int(state["step"])
    steps = shown(start) if start < plan.steps else iter(())

    def learnt() -> dict[str, Any]:
        return {"step": done, "head": head.state_dict(), "optimizer": optimizer.state_dict()}

    with plan.resume.kept(learnt):
        for maps, truth in watch(steps, plan.steps, "train head", start, together=True):
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
                plan.resume.save(learnt())
    head.eval()


def _warm(step: int, warmup: int, ratio: float) -> float:
    return 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)


def _average(head: nn.Module) -> None:
    """Gradients and batch statistics over all processes: one sum of all of them, laid end to end."""
    if world_size() == 1:
        return
    own = [p.grad for p in head.parameters() if p.grad is not None]
    own += [buffer for buffer in head.buffers() if buffer.is_floating_point()]
    total = all_reduce_sum(torch.cat([x.flatten() for x in own])) / world_size()
    for x, part in zip(own, total.split([x.numel() for x in own]), strict=True):
        x.copy_(part.view_as(x))
