"""Which frames of a clip are looked at: four ways, each with its name.

even   the clip is cut into equal slots: the frame in the middle of each; in training, any frame of each slot
ends   equal steps from the first frame to the last
dense  every `stride`th frame, from the middle of the clip; in training, from anywhere in it
fps    `rate` frames a second by the time stamps; if they are more than wanted, as `even`

A clip with too few frames gives all it has, then its last one again; a mask says which frames are repeated.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

Way = Literal["even", "ends", "dense", "fps"]
EPSILON = 1e-6  # seconds: stamps are rounded


@dataclass(frozen=True)
class Sampling:
    """Takes `count` frames of a clip.

    Raises:
        ValueError: if there is no such way, or a number is too small.
    """

    way: Way = "even"
    count: int = 8  # frames
    stride: int = 1  # of way=dense: frames from one to the next
    rate: float = 1.0  # of way=fps: frames a second

    def __post_init__(self) -> None:
        ways = ("even", "ends", "dense", "fps")
        if self.way not in ways:
            raise ValueError(f"There is no way '{self.way}' to take frames; there is: {', '.join(ways)}.")
        for name, value, least in (("count", self.count, 1), ("stride", self.stride, 1)):
            if value < least:
                raise ValueError(f"{name}={value}, but it must be {least} or more.")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}, but it must be above 0.")

    def __call__(
        self, seconds: Sequence[float], rng: np.random.Generator | None = None
    ) -> tuple[list[int], list[bool]]:
        """The numbers of the frames, and which of them are no repetition.

        Args:
            seconds: when each frame of the clip is shown, ascending; one at least.
            rng: for training, where the way has a choice; None for evaluation, where it has none.

        Returns:
            Two lists of length `count`; the numbers ascend.

        Raises:
            ValueError: for a clip without frames.
        """
        length = len(seconds)
        if not length:
            raise ValueError("The clip has no frames.")
        if self.way == "dense":
            found = _dense(length, self.count, self.stride, rng)
        elif self.way == "fps":
            found = _at_rate(seconds, self.count, self.rate, rng)
        elif length <= self.count:
            found = list(range(length))
        elif self.way == "even":
            found = _even(length, self.count, rng)
        else:
            found = _ends(length, self.count)
        repeated = self.count - len(found)
        return found + found[-1:] * repeated, [True] * len(found) + [False] * repeated


def _even(length: int, count: int, rng: np.random.Generator | None) -> list[int]:
    """For length >= count. In training every frame of a slot is equally frequent, the last frame too."""
    if rng is None:
        return [(2 * k + 1) * length // (2 * count) for k in range(count)]
    edges = [k * length // count for k in range(count + 1)]
    return [int(rng.integers(low, high)) for low, high in pairwise(edges)]


def _ends(length: int, count: int) -> list[int]:
    """For length > count; of one frame, the middle. Halves go up."""
    if count == 1:
        return [length // 2]
    steps = count - 1
    return [(2 * k * (length - 1) + steps) // (2 * steps) for k in range(count)]


def _dense(length: int, count: int, stride: int, rng: np.random.Generator | None) -> list[int]:
    spare = length - 1 - (count - 1) * stride  # frames beside the window; below 0 if it does not fit
    start = 0 if spare < 0 else spare // 2 if rng is None else int(rng.integers(spare + 1))
    return [number for number in range(start, start + count * stride, stride) if number < length]


def _at_rate(seconds: Sequence[float], count: int, rate: float, rng: np.random.Generator | None) -> list[int]:
    """The frame that is shown in the middle of each slot of 1 / rate seconds."""
    length = len(seconds)
    shown = (seconds[-1] - seconds[0]) / (length - 1) if length > 1 else 0.0  # how long the last one is
    slots = max(1, int((seconds[-1] - seconds[0] + shown) * rate + EPSILON))
    middles = [seconds[0] + (k + 0.5) / rate for k in range(slots)]
    frames = [max(0, bisect_right(seconds, time + EPSILON) - 1) for time in middles]
    frames = list(dict.fromkeys(frames))  # at a higher rate than the clip's own, a frame is taken once
    return [frames[i] for i in _even(len(frames), count, rng)] if len(frames) > count else frames
