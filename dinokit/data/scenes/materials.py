"""The ten kinds of objects of the built-in scenes: the material and the outline of each.

A material says where an object has its second colour; the two colours are drawn for each object. Kinds share
their outlines by twos, as zebras and horses do.

    s, t  place in a repeating picture, in periods of the pattern; s points right, t down
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Plane = NDArray[np.float64]  # (TILE, TILE)

TILE, PERIODS = 256, 4  # pixels of a side of a material's picture, and periods of the pattern along it
BLURS = (2.0, 4.0, 7.0)  # pixels: copies of a picture for near and far objects, so that far ones do not alias
_SEED = 7  # of the materials that are irregular


class Kind(NamedTuple):
    """What the objects of a class have in common."""

    name: str
    pattern: Callable[[Plane, Plane], NDArray[np.bool_]]
    pitch: float  # length of a period over the radius of an object
    lobes: int  # waves along the outline; 0: an ellipse


def _fold(a: Plane) -> Plane:
    """Place within a period, from -0.5 to 0.5."""
    return a - np.floor(a) - 0.5


def _bars(s: Plane, t: Plane) -> NDArray[np.bool_]:
    return _fold(s) > 0


def _bands(s: Plane, t: Plane) -> NDArray[np.bool_]:
    return _fold(t) > 0


def _checks(s: Plane, t: Plane) -> NDArray[np.bool_]:
    return _fold(s) * _fold(t) > 0


def _dots(s: Plane, t: Plane) -> NDArray[np.bool_]:
    return np.hypot(_fold(s), _fold(t)) < 0.32


def _rings(s: Plane, t: Plane) -> NDArray[np.bool_]:
    r = np.hypot(_fold(s), _fold(t))
    return (r < 0.12) | ((r > 0.26) & (r < 0.42))


def _zigzag(s: Plane, t: Plane) -> NDArray[np.bool_]:
    return _fold(t + np.abs(_fold(s))) > 0


def _net(s: Plane, t: Plane) -> NDArray[np.bool_]:
    return (np.abs(_fold(s)) < 0.15) | (np.abs(_fold(t)) < 0.15)


def _cells(s: Plane, t: Plane) -> NDArray[np.bool_]:
    """Seams between the cells of a Voronoi diagram that repeats, as on a giraffe."""
    distance = _distances(s, t, count=22)
    return distance[1] - distance[0] < 0.2


def _blotches(s: Plane, t: Plane) -> NDArray[np.bool_]:
    """Smooth noise above its median, as on a cow."""
    return _noise(low=0.3, high=0.9) > 0


def _speckle(s: Plane, t: Plane) -> NDArray[np.bool_]:
    """Fine noise above its median, as on granite."""
    return _noise(low=1.7, high=2.8) > 0


KINDS = (
    Kind("bars", _bars, 0.70, 0),
    Kind("checks", _checks, 0.90, 4),
    Kind("dots", _dots, 0.75, 2),
    Kind("rings", _rings, 1.10, 3),
    Kind("zigzag", _zigzag, 0.85, 5),
    Kind("bands", _bands, 0.70, 0),
    Kind("cells", _cells, 1.00, 4),
    Kind("net", _net, 0.80, 3),
    Kind("blotches", _blotches, 0.80, 2),
    Kind("speckle", _speckle, 0.90, 5),
)
NAMES = tuple(kind.name for kind in KINDS)


def material_pictures() -> Floats:
    """(kinds, blurs, TILE, TILE) in [0, 1]: the share of the second colour; each repeats at its edges."""
    axis = np.arange(TILE) / TILE * PERIODS
    s, t = np.meshgrid(axis, axis)
    f = np.fft.fftfreq(TILE)
    square = f[:, None] ** 2 + f**2
    gains = [np.exp(-2 * (np.pi * blur) ** 2 * square) for blur in BLURS]
    spectra = [np.fft.fft2(kind.pattern(s, t).astype(np.float64)) for kind in KINDS]
    soft = [[np.fft.ifft2(spectrum * gain).real for gain in gains] for spectrum in spectra]
    return np.clip(np.array(soft), 0, 1).astype(np.float32)


def _distances(s: Plane, t: Plane, count: int) -> Plane:
    """Distances (count, TILE, TILE) to random points, the nearest first, on a plane that repeats."""
    points = np.random.default_rng(_SEED).uniform(0, PERIODS, (count, 2))
    half = PERIODS / 2
    away = [np.hypot((s - x + half) % PERIODS - half, (t - y + half) % PERIODS - half) for x, y in points]
    return np.sort(np.stack(away), axis=0)


def _noise(low: float, high: float) -> Plane:
    """Noise (TILE, TILE) of spatial frequencies from `low` to `high`, in waves a period; its median is 0."""
    f = np.fft.fftfreq(TILE, 1 / TILE) / PERIODS
    radius = np.hypot(f[:, None], f)
    spectrum = np.fft.fft2(np.random.default_rng(_SEED).standard_normal((TILE, TILE)))
    noise = np.fft.ifft2(spectrum * ((radius >= low) & (radius <= high))).real
    return noise - np.median(noise)
