"""Renders one built-in scene: a tilted ground with clutter, and some objects of one silhouette before it.

Letters: n objects or surfaces, S side of the image in pixels. The image spans [-1, 1] in both directions; x
points right, y down. A distance is in metres from the camera.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinokit.data.scenes.shapes import outline

Floats = NDArray[np.float32]
Reals = NDArray[np.float64]  # (n,): one number per object

OBJECTS = (12, 16)  # fewest, most
GROUNDS = 3  # textures on the ground of one image
CLUTTER = 6  # spots and streaks on the ground of one image
NEAR, FAR = 2.4, 4.4  # metres: where objects stand; the ground begins at 6
HAZE = 0.5  # grey that far things fade to: the same in all images, so that it does not identify an image

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


@dataclass(frozen=True)
class Scene:
    """An image with the class and the depth of each pixel."""

    image: NDArray[np.uint8]  # (S, S, 3)
    mask: NDArray[np.uint8]  # (S, S): 1 + label on an object, 0 elsewhere
    depth: Floats  # (S, S): metres
    label: int


@dataclass(frozen=True)
class Objects:
    """The objects of a scene, farthest first."""

    distance: Floats  # (n,): metres
    u: Floats  # (n, S, S): coordinates on the object, in which all silhouettes have one area
    v: Floats
    cover: Floats  # (n, S, S): share of the pixel inside the silhouette
    inside: Floats  # (n, S, S): 0 at the outline, 1 well inside


class Renderer:
    """Renders scenes of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        axis = (2 * (np.arange(size, dtype=np.float32) + 0.5) / size - 1).astype(np.float32)
        self.x, self.y = (np.ascontiguousarray(a) for a in np.meshgrid(axis, axis))  # (S, S) each
        self.broad, self.coarse, self.fine = (Noise(size, cells) for cells in (4, 9, 24))

    def render(self, rng: np.random.Generator, label: int, time: float = 0.0) -> Scene:
        """The scene drawn from `rng`, with silhouette `label` (an index of shapes.NAMES).

        At `time` 1 each object has moved by up to 1 in both directions.
        """
        ground_depth = self._ground_depth(rng)
        objects = self._place_objects(rng, label, time)
        n = len(objects.distance)
        surface = patterns(
            rng,
            [*[1.5 * self.x] * GROUNDS, *objects.u],
            [*[1.5 * self.y] * GROUNDS, *objects.v],
            self.coarse(rng, GROUNDS + n),
            self.fine(rng, GROUNDS + n),
        )
        light = rng.uniform(-1, 1, 2).astype(np.float32)
        image = self._ground(rng, surface[:GROUNDS])
        self._clutter(rng, image)
        image *= 1 - 0.5 * self._shadow(objects, light)
        image += _fog(ground_depth) * (HAZE - image)
        self._paint(rng, image, objects, surface[GROUNDS:], light)
        image *= np.exp(0.12 * self.broad(rng, 1)[0] - 0.02)
        image = soften(image, rng.uniform(0.06, 0.14))
        image += rng.uniform(0.015, 0.025) * rng.standard_normal(image.shape, dtype=np.float32)
        mask, depth = _mask_and_depth(objects, ground_depth, label)
        pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Scene(np.ascontiguousarray(pixels.transpose(1, 2, 0)), mask, depth, label)

    def _ground_depth(self, rng: np.random.Generator) -> Floats:
        # A plane has an inverse depth that is linear in the image. The slopes add up to 0.5 at most, so it
        # lies between 9 / 1.5 = 6 and 12 / 0.5 = 24 metres.
        down, across = rng.uniform(0.15, 0.4), rng.uniform(-0.1, 0.1)
        return (rng.uniform(9, 12) / (1 + down * self.y + across * self.x)).astype(np.float32)

    def _place_objects(self, rng: np.random.Generator, label: int, time: float) -> Objects:
        n = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
        # One object per depth stratum, with gaps: there is a step in depth wherever one object hides another.
        strata = (np.arange(n)[::-1] + rng.uniform(0.15, 0.85, n)) / n
        distance = NEAR * (FAR / NEAR) ** strata
        radius = (
            rng.uniform(0.5, 0.65, n) / distance
        )  # objects have similar sizes, so distant ones look small
        x, y = _spread_out(rng, radius, lower=0.15 * (1 - 2 * strata))
        if time:  # with separate random numbers, so that everything else is as at time 0
            x, y = np.stack([x, y]) + time * rng.spawn(1)[0].uniform(-1, 1, (2, n))
        angle = rng.uniform(-0.3, 0.3, n)
        mirror = rng.choice([-1.0, 1.0], n)
        stretch = np.exp(rng.uniform(-0.1, 0.1, n))
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        turn = np.array([[mirror * stretch * cos, mirror * stretch * sin], [-sin / stretch, cos / stretch]])
        a, b, c, d = turn.astype(np.float32).reshape(4, n, 1, 1)
        dx, dy = self.x - _column(x), self.y - _column(y)
        u, v = a * dx + b * dy, c * dx + d * dy
        edge = outline(label, u, v)
        cover = np.clip(0.5 - edge * _column(radius * self.size / 2), 0, 1)
        return Objects(distance.astype(np.float32), u, v, cover, np.clip(edge * -5, 0, 1))

    def _ground(self, rng: np.random.Generator, surface: Floats) -> Floats:
        # Faint patterns in patches, and all hues: a conspicuous ground would identify the image, and two
        # crops would be matched by it instead of by the silhouette. Dark, because outlines of one polarity
        # are learnt in minutes.
        image = 0.36 + 0.055 * self.coarse(rng, 3)
        image += 0.035 * self.fine(rng, 1)
        share = self.coarse(rng, GROUNDS)
        best = share.max(axis=0)
        for k in range(GROUNDS):
            image += (share[k] == best) * (0.12 * surface[k] - np.float32(0.06))
        return image

    def _clutter(self, rng: np.random.Generator, image: Floats) -> None:
        # Ragged spots and long streaks, partly transparent: outlines that belong to no class.
        x, y = rng.uniform(-1, 1, (2, CLUTTER))
        angle = rng.uniform(0, math.pi, CLUTTER)
        long = np.exp(rng.uniform(math.log(0.15), math.log(1.2), CLUTTER))
        wide = np.maximum(0.04, 0.04 / long)
        turn = np.array(
            [np.cos(angle) / long, np.sin(angle) / long, -np.sin(angle) / wide, np.cos(angle) / wide]
        )
        opacity = rng.uniform(0.25, 0.6, CLUTTER)
        paint = colours(rng, spread_hues(rng, CLUTTER), (0.1, 0.6), (0.2, 0.7))[:, :, None, None]
        ragged = 0.8 * self.coarse(rng, CLUTTER) - 1
        for k, (a, b, c, d) in enumerate(turn.T.tolist()):
            dx, dy = self.x - float(x[k]), self.y - float(y[k])
            edge = ragged[k] + (a * dx + b * dy) ** 2 + (c * dx + d * dy) ** 2
            image += np.clip(0.5 - 2.5 * edge, 0, 1) * float(opacity[k]) * (paint[k] - image)

    def _shadow(self, objects: Objects, light: Floats) -> Floats:
        # The area of the objects, shifted away from the light by up to a twentieth of the image.
        cover = objects.cover.max(axis=0)
        reach = self.size // 20 + 1
        row, column = (reach + np.rint(light[::-1] * reach)).astype(int)
        wide = np.pad(cover, reach)
        return wide[row : row + self.size, column : column + self.size]

    def _paint(
        self, rng: np.random.Generator, image: Floats, objects: Objects, surface: Floats, light: Floats
    ) -> None:
        n = len(surface)
        paint = colours(rng, spread_hues(rng, 2 * n), (0.35, 0.75), (0.7, 1.0)).reshape(2, n, 3, 1, 1)
        contrast = rng.uniform(0.2, 0.6, n).tolist()
        rim = np.float32(0.4)  # darker near the outline, as on anything that is not flat
        shade = (1 - rim + rim * objects.inside) * (1 + 0.12 * (light[0] * objects.u + light[1] * objects.v))
        fog = _fog(objects.distance)
        for k in range(n):
            lit = (paint[0, k] + surface[k] * contrast[k] * (paint[1, k] - paint[0, k])) * shade[k]
            lit += fog[k] * (HAZE - lit)
            image += objects.cover[k] * (lit - image)


def _spread_out(rng: np.random.Generator, radius: Reals, lower: Reals) -> tuple[Reals, Reals]:
    # Each object takes the candidate position where nearer objects hide it least; near objects choose first.
    n = len(radius)
    reach = 1 - 0.75 * radius
    positions = rng.uniform(-1, 1, (2, n, 8)) * reach[:, None]  # (2, n, candidates)
    positions[1] += lower[:, None]
    chosen = np.empty((2, n))
    chosen[:, -1] = positions[:, -1, 0]
    for k in range(n - 2, -1, -1):
        gap = np.hypot(*(positions[:, k, :, None] - chosen[:, None, k + 1 :])) / (radius[k] + radius[k + 1 :])
        chosen[:, k] = positions[:, k, gap.min(axis=1).argmax()]
    return chosen[0], chosen[1]


def _fog(distance: Floats) -> Floats:
    return 1 - np.exp(-distance / 40)


def _mask_and_depth(objects: Objects, ground_depth: Floats, label: int) -> tuple[NDArray[np.uint8], Floats]:
    depth = ground_depth
    for distance, cover in zip(objects.distance, objects.cover, strict=True):
        depth = np.where(cover >= 0.5, distance, depth)
    mask = np.where(depth < ground_depth, np.uint8(label + 1), np.uint8(0))
    return mask, depth


def _column(values: Reals) -> Floats:
    return values.astype(np.float32)[:, None, None]


class Noise:
    """Smooth noise of unit variance: a few random values on a coarse grid, interpolated by Gaussian bumps."""

    def __init__(self, size: int, cells: int) -> None:
        position = (np.arange(size) + 0.5) / size * (cells - 1)
        bumps = np.exp(-0.5 * ((position[:, None] - np.arange(cells)) / 0.55) ** 2)
        # Rows of unit length make the variance one everywhere, also between grid points.
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
    wheel = np.array([5, 3, 1], dtype=np.float32)  # positions of red, green and blue, in sixths of a turn
    k = (wheel + 6 * hues[:, None]) % 6
    return bright - bright * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def spread_hues(rng: np.random.Generator, n: int) -> Floats:
    """`n` hues (n,) in turns, evenly around the wheel and in random order: every image has all of them."""
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
    heights = np.empty_like(coarse)
    for k in range(n):  # one surface at a time fits into the processor's cache: twice as fast as all together
        wave, crossed, dots, rough, grain = _KINDS[kind[k]]
        height = rough * coarse[k] + grain * fine[k]
        if wave or crossed or dots:
            warp = bend[k] * coarse[k]
            one = np.sin(cos[k] * u[k] + sin[k] * v[k] + warp + phase[k][0])
            two = np.sin(cos[k] * v[k] - sin[k] * u[k] + warp + phase[k][1])
            height += wave * one + crossed * one * two + dots * (one + two - 0.4)
        height *= gain[k]
        height += 0.5
        np.clip(height, 0, 1, out=heights[k])
    return heights


def soften(image: Floats, weight: float) -> Floats:
    """Blur (3, S, S) along both sides by the taps (weight, 1 - 2 * weight, weight); borders repeat."""
    taps = (weight, 1 - 2 * weight, weight)
    wide = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = taps[0] * wide[:, :-2] + taps[1] * wide[:, 1:-1] + taps[2] * wide[:, 2:]
    return taps[0] * rows[:, :, :-2] + taps[1] * rows[:, :, 1:-1] + taps[2] * rows[:, :, 2:]
