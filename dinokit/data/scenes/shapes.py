"""The ten silhouettes of the built-in scenes, as functions of the plane.

A silhouette is where its function is negative; the value is about the distance to the outline. All have the
same area, so the share of object pixels does not depend on the class. u points right, v down.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]  # any shape

AREA = 2.0  # of every silhouette
REACH = 1.55  # no silhouette has a point farther from the origin

_RING_HOLE = 0.56
_CROSS_ARM = 0.33  # half the width of an arm
_BITE, _BITE_SHIFT = 0.82, 0.55  # the disc that is cut out of the crescent: radius, distance of its centre


def _disc(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, v) - 1


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 1


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - 0.5


def _star(u: Plane, v: Plane) -> Plane:
    # A pentagram is the points outside at most one side of its inner pentagon: the second largest of five.
    angles = [math.pi / 2 + 2 * math.pi * k / 5 for k in range(5)]
    first = math.cos(angles[0]) * u + math.sin(angles[0]) * v
    second = np.full_like(first, -np.inf)
    for angle in angles[1:]:
        side = math.cos(angle) * u + math.sin(angle) * v
        second = np.maximum(second, np.minimum(first, side))
        first = np.maximum(first, side)
    return second - math.cos(2 * math.pi / 5)


def _cross(u: Plane, v: Plane) -> Plane:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 1, np.minimum(u, v) - _CROSS_ARM)


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.hypot(u, v) - (1 + _RING_HOLE) / 2) - (1 - _RING_HOLE) / 2


def _crescent(u: Plane, v: Plane) -> Plane:
    u = u - 0.2  # puts its middle near the origin
    return np.maximum(np.hypot(u, v) - 1, _BITE - np.hypot(u - _BITE_SHIFT, v))


def _heart(u: Plane, v: Plane) -> Plane:
    # A square on its tip, and a half disc on each of its upper sides.
    u = np.abs(u)
    tip = (u + np.abs(v) - 1) * math.sqrt(0.5)
    return np.minimum(tip, np.hypot(u - 0.5, v + 0.5) - math.sqrt(0.5))


def _arrow(u: Plane, v: Plane) -> Plane:
    u = np.abs(u)
    slope = math.hypot(1.0, 0.85)
    head = np.maximum(v, (u - 0.85 * (v + 1)) / slope)
    shaft = np.maximum(u - 0.28, np.abs(v - 0.4) - 0.6)
    return np.minimum(head, shaft)


def _bowtie(u: Plane, v: Plane) -> Plane:
    u = np.abs(u)
    return np.maximum(u - 1, (np.abs(v) - 0.12 - 0.7 * u) / math.hypot(1.0, 0.7))


def _pentagram_area() -> float:
    t = math.tan(math.pi / 10)
    return 10 * t / (3 - t * t)


def _crescent_area() -> float:
    # A disc of radius 1 without its overlap with the bite: two circular segments on a common chord.
    d, r = _BITE_SHIFT, _BITE
    x = (d * d + 1 - r * r) / (2 * d)  # where the chord cuts the line of centres
    overlap = math.acos(x) - x * math.sqrt(1 - x * x)
    overlap += r * r * math.acos((d - x) / r) - (d - x) * math.sqrt(1 - x * x)
    return math.pi - overlap


# By name: the function, and the area of its silhouette.
_SHAPES: dict[str, tuple[Callable[[Plane, Plane], Plane], float]] = {
    "disc": (_disc, math.pi),
    "square": (_square, 4.0),
    "triangle": (_triangle, 1.5 * math.sqrt(0.75)),
    "star": (_star, _pentagram_area()),
    "cross": (_cross, 8 * _CROSS_ARM - 4 * _CROSS_ARM**2),
    "ring": (_ring, math.pi * (1 - _RING_HOLE**2)),
    "crescent": (_crescent, _crescent_area()),
    "heart": (_heart, 2 + math.pi / 2),
    "arrow": (_arrow, 0.85 + 0.56),
    "bowtie": (_bowtie, 4 * 0.12 + 2 * 0.7),
}
NAMES = tuple(_SHAPES)


def outline(label: int, u: Plane, v: Plane) -> Plane:
    """About the distance to the outline of silhouette `label` at the points (u, v), negative inside."""
    function, area = _SHAPES[NAMES[label]]
    zoom = np.float32(math.sqrt(area / AREA))
    return function(u * zoom, v * zoom) / zoom
