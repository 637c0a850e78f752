"""What surfaces of the built-in scenes look like: smooth noise, patterns, colours.

Letters: n surfaces, S side of the image in pixels. Arrays are float32.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Rows: plain, stripes, checks, dots, marble, speckle. Columns: the weight of one wave, of two crossed waves
# multiplied and added, of coarse noise and of fine noise.
_KINDS = (
    (0.00, 0.00, 0.00, 0.20, 0.10),
    (1.00, 0.00, 0.00, 0.10, 0.10),
    (0.00, 1.50, 0.00, 0.10, 0.10),
    (0.00, 0.00, 0.90, 0.00, 0.10),
    (0.15, 0.00, 0.00, 0.80, 0.20),
    (0.00, 0.00, 0.00, 0.20, 0.80),
)


class Noise:
    """Smooth noise of unit variance: a few random values on a coarse grid, spread by Gaussian bumps."""

    def __init__(self, size: int, cells: int) -> None:
        place = (np.arange(size) + 0.5) / size * (cells - 1)
        bumps = np.exp(-0.5 * ((place[:, None] - np.arange(cells)) / 0.55) ** 2)
        # Unit rows keep the variance at one everywhere, on a grid point and between two.
        self.spread = (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)  # (S, cells)

    def __call__(self, rng: np.random.Generator, n: int) -> Floats:
        """`n` fields (n, S, S)."""
        cells = self.spread.shape[1]
        grid = rng.standard_normal((n, cells, cells), dtype=np.float32)
        return self.spread @ grid @ self.spread.T


def colours(
    rng: np.random.Generator, hues: Floats, saturation: tuple[float, float], value: tuple[float, float]
) -> Floats:
    """Random RGB colours (n, 3) in [0, 1]: hues (n,) in turns, saturation and value from the ranges given."""
    n = len(hues)
    s = rng.uniform(*saturation, n).astype(np.float32)[:, None]
    bright = rng.uniform(*value, n).astype(np.float32)[:, None]
    wheel = np.array(
        [5, 3, 1], dtype=np.float32
    )  # where red, green and blue stand on it, in sixths of a turn
    k = (wheel + 6 * hues[:, None]) % 6
    return bright - bright * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def spread_hues(rng: np.random.Generator, n: int) -> Floats:
    """`n` hues (n,) in turns, evenly around the wheel and in random order: every image holds all of them."""
    return ((rng.permutation(n) + rng.uniform(0, 0.5, n)) / n).astype(np.float32)


def patterns(
    rng: np.random.Generator, u: Sequence[Floats], v: Sequence[Floats], coarse: Floats, fine: Floats
) -> Floats:
    """Where each surface has its second colour, in [0, 1]; its first is where this is 0. Returns (n, S, S).

    u, v are n coordinates (S, S) on the surfaces; coarse, fine are noise (n, S, S).
    """
    n = len(u)
    # The kinds take turns, so that the mix is about the same in all images.
    kind = (rng.permutation(n) + rng.integers(len(_KINDS))) % len(_KINDS)
    angle = rng.uniform(0, math.pi, n)
    pitch = np.exp(rng.uniform(math.log(5.0), math.log(14.0), n))  # radians a unit of u
    cos, sin = (pitch * np.cos(angle)).tolist(), (pitch * np.sin(angle)).tolist()
    phase = rng.uniform(0, 2 * math.pi, (n, 2)).tolist()
    bend = rng.uniform(0.0, 0.9, n).tolist()
    gain = rng.uniform(0.5, 2.5, n).tolist()
    done = np.empty_like(coarse)
    for k in range(n):  # one surface at a time stays in the processor's cache: twice as fast as all at once
        wave, crossed, dots, rough, grain = _KINDS[kind[k]]
        height = rough * coarse[k] + grain * fine[k]
        if wave or crossed or dots:
            warp = bend[k] * coarse[k]
            one = np.sin(cos[k] * u[k] + sin[k] * v[k] + warp + phase[k][0])
            two = np.sin(cos[k] * v[k] - sin[k] * u[k] + warp + phase[k][1])
            height += wave * one + crossed * one * two + dots * (one + two - 0.4)
        height *= gain[k]
        height += 0.5
        np.clip(height, 0, 1, out=done[k])
    return done


def soften(image: Floats, weight: float) -> Floats:
    """Blur (3, S, S) along both sides by the taps (weight, 1 - 2 * weight, weight); borders repeat."""
    taps = (weight, 1 - 2 * weight, weight)
    wide = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = taps[0] * wide[:, :-2] + taps[1] * wide[:, 1:-1] + taps[2] * wide[:, 2:]
    return taps[0] * rows[:, :, :-2] + taps[1] * rows[:, :, 1:-1] + taps[2] * rows[:, :, 2:]
