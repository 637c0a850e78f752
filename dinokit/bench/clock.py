"""Where the time goes: calls that count their time by phase, what they call in turn taken off."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from dinokit.bench.machine import wait


class Clock:
    """Adds up the time of each phase, s. A nested call's time is its own alone, so the sum is the whole."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """From now on count calls of `owner.name` as `phase`."""
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def timed(self, work: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`work`, counted."""

        @wraps(work, updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            begun = time.perf_counter()
            self._inner.append(0.0)
            out = work(*args, **kwargs)
            wait(self.device)
            whole = time.perf_counter() - begun
            self.seconds[phase] = self.seconds.get(phase, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole
            return out

        return run
