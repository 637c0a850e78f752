"""How one built-in scene is made: a tilted ground, clutter on it, some objects of one silhouette before it.

Letters: n objects, S side of the image in pixels. The image spans [-1, 1] both ways; x points right, y down.
A distance is in metres from the camera.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinokit.data.scenes.paint import Floats, Noise, colours, patterns, soften, spread_hues
from dinokit.data.scenes.shapes import outline

Reals = NDArray[np.float64]  # (n,): one number an object

OBJECTS = (12, 16)  # fewest, most
GROUNDS = 3  # textures on the ground of one image
CLUTTER = 6  # spots and streaks on the ground of one image
NEAR, FAR = 2.4, 4.4  # metres: where objects stand; the ground begins at 6
HAZE = 0.5  # grey that far things fade to: the same in all images, so that it tells none from another


@dataclass(frozen=True)
class Scene:
    """An image and the truth about each of its pixels."""

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
    """Draws scenes; holds only what depends on the size of the image."""

    def __init__(self, size: int) -> None:
        self.size = size
        axis = (2 * (np.arange(size, dtype=np.float32) + 0.5) / size - 1).astype(np.float32)
        self.x, self.y = (np.ascontiguousarray(a) for a in np.meshgrid(axis, axis))  # (S, S) each
        self.broad, self.coarse, self.fine = (Noise(size, cells) for cells in (4, 9, 24))

    def render(self, rng: np.random.Generator, label: int, time: float = 0.0) -> Scene:
        """The scene that `rng` describes, with silhouette `label` (an index of _scenes_shapes.NAMES).

        With a `time` of 1, the objects have each moved by up to 1 both ways.
        """
        ground_depth = self._ground_depth(rng)
        objects = self._place(rng, label, time)
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
        mask, depth = _truth(objects, ground_depth, label)
        pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Scene(np.ascontiguousarray(pixels.transpose(1, 2, 0)), mask, depth, label)

    def _ground_depth(self, rng: np.random.Generator) -> Floats:
        # A plane has an inverse depth that is linear in the image. The slopes add up to 0.5 at most, so it
        # lies between 9 / 1.5 = 6 and 12 / 0.5 = 24 metres.
        down, across = rng.uniform(0.15, 0.4), rng.uniform(-0.1, 0.1)
        return (rng.uniform(9, 12) / (1 + down * self.y + across * self.x)).astype(np.float32)

    def _place(self, rng: np.random.Generator, label: int, time: float) -> Objects:
        n = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
        # One object a stratum, with a gap between two: there is a step in depth wherever one hides another.
        strata = (np.arange(n)[::-1] + rng.uniform(0.15, 0.85, n)) / n
        distance = NEAR * (FAR / NEAR) ** strata
        radius = rng.uniform(0.5, 0.65, n) / distance  # of things of like size, the far ones look small
        x, y = _spread_out(rng, radius, lower=0.15 * (1 - 2 * strata))
        if time:  # by numbers of their own, so that all else is drawn as at the start
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
        # Faint patterns in patches, and hues from all around the wheel: a ground that stood out would tell
        # its image from all others, and two crops would be matched by it instead of by the silhouette. Dark,
        # because outlines of one polarity are learnt in minutes.
        image = 0.36 + 0.055 * self.coarse(rng, 3)
        image += 0.035 * self.fine(rng, 1)
        share = self.coarse(rng, GROUNDS)
        best = share.max(axis=0)
        for k in range(GROUNDS):
            image += (share[k] == best) * (0.12 * surface[k] - np.float32(0.06))
        return image

    def _clutter(self, rng: np.random.Generator, image: Floats) -> None:
        # Ragged spots and long streaks, some see-through: outlines that belong to no class.
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
        # What the objects cover, moved away from the light by up to a twentieth of the image.
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
        rim = np.float32(0.4)  # an outline in the dark, as on anything that is not flat
        shade = (1 - rim + rim * objects.inside) * (1 + 0.12 * (light[0] * objects.u + light[1] * objects.v))
        fog = _fog(objects.distance)
        for k in range(n):
            lit = (paint[0, k] + surface[k] * contrast[k] * (paint[1, k] - paint[0, k])) * shade[k]
            lit += fog[k] * (HAZE - lit)
            image += objects.cover[k] * (lit - image)


def _spread_out(rng: np.random.Generator, radius: Reals, lower: Reals) -> tuple[Reals, Reals]:
    # Of some random places each object takes the one least hidden by those before it; near ones choose first.
    n = len(radius)
    reach = 1 - 0.75 * radius
    places = rng.uniform(-1, 1, (2, n, 8)) * reach[:, None]  # (2, n, candidates)
    places[1] += lower[:, None]
    chosen = np.empty((2, n))
    chosen[:, -1] = places[:, -1, 0]
    for k in range(n - 2, -1, -1):
        gap = np.hypot(*(places[:, k, :, None] - chosen[:, None, k + 1 :])) / (radius[k] + radius[k + 1 :])
        chosen[:, k] = places[:, k, gap.min(axis=1).argmax()]
    return chosen[0], chosen[1]


def _fog(distance: Floats) -> Floats:
    return 1 - np.exp(-distance / 40)


def _truth(objects: Objects, ground_depth: Floats, label: int) -> tuple[NDArray[np.uint8], Floats]:
    depth = ground_depth
    for distance, cover in zip(objects.distance, objects.cover, strict=True):
        depth = np.where(cover >= 0.5, distance, depth)
    mask = np.where(depth < ground_depth, np.uint8(label + 1), np.uint8(0))
    return mask, depth


def _column(values: Reals) -> Floats:
    return values.astype(np.float32)[:, None, None]
