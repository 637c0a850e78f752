"""Renders the built-in scenes: objects of ten kinds that stand on a floor before a wall.

A kind is a material (stripes, cells, speckle, ...) on an outline. Colours, polarity, position, distance,
pose, light, floor, wall and clutter have the same distributions for all kinds, and the hues of an image go
round the colour circle: neither pixels nor mean colours tell the kind, but every crop that contains part of
an object shows its material.

Letters: n objects, S side of the image in pixels. The image spans [-1, 1] in both directions; x points right,
y down. All lengths are in this unit, so another size shows the same scene. Distances are in metres.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinokit.data.scenes.materials import KINDS, PERIODS, TILE, material_pictures
from dinokit.data.scenes.materials import NAMES as NAMES

Floats = NDArray[np.float32]
Labels = NDArray[np.uint8]

OBJECTS = (3, 5)  # fewest, most in an image
MIXED_OBJECTS, MIXED_KINDS = (4, 6), (2, 3)  # fewest, most in a scene of several kinds
CLIP_OBJECTS = 4
HORIZON = (-0.8, -0.3)  # y
NEAR, FAR = 1.7, 4.2  # metres: where objects stand
WALL = 8.0  # metres
CAMERA = 2.9  # a point of the floor at y is CAMERA / (y - horizon) metres away
HAZE = 18.0  # metres in which two thirds of a colour fade
PEBBLES = 5  # stones and sticks in an image
# Separate random numbers, so no scene is in two. A new stream goes to the end: places are part of the seed.
_STREAMS = ("train", "test", "clip train", "clip test", "mixed train", "mixed test")


def split_counts(split: str, count: int, test_count: int, **more: int) -> dict[str, int]:
    """Items of each split that `split` means: all is train, then test; `more` are further splits."""
    counts = {"train": count, "test": test_count}
    return counts if split == "all" else {split: {**counts, **more}[split]}


def locate(index: int, counts: Mapping[str, int]) -> tuple[str, int]:
    """The split of item `index` of splits that follow each other, and its number in that split.

    Raises:
        IndexError: if there is no such item.
    """
    number = index
    for split, count in counts.items():
        if 0 <= number < count:
            return split, number
        number -= count
    name = split if len(counts) == 1 else "all"
    raise IndexError(f"There is no image {index}: split '{name}' has {sum(counts.values())}, counted from 0.")


@dataclass(frozen=True)
class Scene:
    """An image and what is known about each of its pixels."""

    image: Labels  # (S, S, 3)
    label: int  # the kind of its objects; of the nearest one in a clip
    mask: Labels  # (S, S): 1 + kind on an object, 0 elsewhere
    instances: Labels  # (S, S): 1 on the nearest object, 2 on the next, ...; 0 elsewhere
    depth: Floats  # (S, S): metres


@dataclass
class Object:
    """One object, as numbers."""

    kind: int
    distance: float  # metres
    x: float
    radius: float  # mean radius in the image at a distance of 1 m
    angle: float  # radians
    squash: float  # height over width
    waves: tuple[tuple[float, float], ...]  # amplitude and phase of slow waves along the outline
    pitch: float  # length of a period of the material over the radius
    turn: float  # radians, of the material on the object
    shift: tuple[float, float]  # of the material, in pixels of its picture
    paint: Floats  # (2, 3): its two colours
    speed: tuple[float, float, float]  # change of x, distance and angle over a clip


@dataclass(frozen=True)
class Canvas:
    """A scene while it is drawn."""

    image: Floats  # (3, S, S)
    mask: Labels  # these as in Scene
    instances: Labels
    depth: Floats


@dataclass(frozen=True)
class View:
    """What the objects of one image share."""

    horizon: float  # y
    light: tuple[float, float]  # direction
    haze: float  # grey that distant colours fade to
    time: float  # 0 at the start of a clip, 1 at its end


class World:
    """Renders scenes and clips of one size, seed and split; each is a function of (seed, split, index)."""

    def __init__(self, size: int = 64, seed: int = 0, split: str = "train") -> None:
        self.size, self.seed, self.split = size, seed, split
        self.materials = material_pictures()
        axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
        self.x, self.y = axis[None, :], axis[:, None]
        self.broad, self.coarse, self.fine = (_bumps(size, cells) for cells in (4, 9, 24))

    def scene(self, index: int) -> Scene:
        """Scene `index`; the kind of its objects is `index` modulo their number."""
        rng = self._rng(self.split, index)
        label = index % len(KINDS)
        objects = _place_objects(rng, [label] * int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)))
        return self._render(rng, objects, label)

    def mixed(self, index: int, kinds: Sequence[int] = range(len(KINDS))) -> Scene:
        """Scene `index` with objects of two or three kinds; its label is the kind of the nearest.

        With one kind in an image, whatever finds the foreground finds every object of the class.

        Args:
            index: of the scene; it shares no random number with scene(index).
            kinds: those that may appear, two at least.
        """
        rng = self._rng("mixed " + self.split, index)
        several = rng.permutation(list(kinds))[: int(rng.integers(MIXED_KINDS[0], MIXED_KINDS[1] + 1))]
        drawn = rng.integers(len(several), size=int(rng.integers(MIXED_OBJECTS[0], MIXED_OBJECTS[1] + 1)))
        drawn[:2] = 0, 1  # at least two kinds
        objects = _place_objects(rng, several[rng.permutation(drawn)].tolist())
        return self._render(rng, objects, objects[-1].kind)

    def clip(self, index: int, frames: int) -> list[Scene]:
        """Clip `index`: objects of different kinds in the same two colours move under a light that flickers.

        An object keeps its number in `instances` from frame to frame.
        """
        stream = "clip " + self.split
        strength, *tint = (self._rng(stream, index).spawn(1)[0].standard_normal((4, frames))).tolist()
        scenes = []
        for k in range(frames):
            rng, objects = self._clip_objects(index)  # the same for each frame
            for thing in objects:
                thing.paint = objects[-1].paint
            lamp = [0.35 * strength[k] + 0.15 * channel[k] for channel in tint]
            scenes.append(self._render(rng, objects, objects[-1].kind, k / max(frames - 1, 1), lamp))
        return scenes

    def tracks(self, index: int, frames: int, points: Floats) -> NDArray[np.float64]:
        """Where points on the objects of clip `index` are in its frames, whether they are hidden or not.

        Args:
            index: of the clip.
            frames: their number.
            points: (n, 2), on an object, in units of its radius from its middle.

        Returns:
            (frames, CLIP_OBJECTS, n, 2) x and y in pixels; object i has the number i + 1 in `instances`.
        """
        rng, objects = self._clip_objects(index)
        horizon = rng.uniform(*HORIZON)
        u, v = np.asarray(points, np.float64).T
        found = np.zeros((frames, len(objects), len(u), 2))
        for k in range(frames):
            for number, thing in enumerate(reversed(objects)):
                x, y, radius, angle = _pose(thing, horizon, k / max(frames - 1, 1))
                cos, sin = math.cos(angle), math.sin(angle)
                found[k, number, :, 0] = x + radius * (cos * u - sin * v)
                found[k, number, :, 1] = y + radius * thing.squash * (sin * u + cos * v)
        return (found + 1) / 2 * self.size

    def _clip_objects(self, index: int) -> tuple[np.random.Generator, list[Object]]:
        """The objects of a clip, and the random numbers that follow."""
        rng = self._rng("clip " + self.split, index)
        return rng, _place_objects(rng, rng.permutation(len(KINDS))[:CLIP_OBJECTS].tolist())

    def _rng(self, stream: str, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, _STREAMS.index(stream), index]))

    def _render(
        self,
        rng: np.random.Generator,
        objects: list[Object],
        label: int,
        time: float = 0.0,
        lamp: list[float] | None = None,
    ) -> Scene:
        """Draw objects, farthest first. `lamp` is the logarithm of the light's colour."""
        size = self.size
        view = View(
            rng.uniform(*HORIZON), tuple(rng.uniform(-1, 1, 2).tolist()), rng.uniform(0.35, 0.65), time
        )
        floor = CAMERA / np.maximum(self.y - view.horizon, 0.01)
        depth = np.broadcast_to(np.minimum(floor, WALL), (size, size)).astype(np.float32)
        image = self._ground(rng, depth)
        image += _fog(depth) * (view.haze - image)
        canvas = Canvas(image, np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8), depth)
        for thing in sorted(objects, key=lambda thing: -_moved(thing, time)[1]):
            self._paint(canvas, thing, len(objects) - objects.index(thing), view)
        light = 0.13 * _noise(rng, self.broad, 1) + rng.uniform(-0.12, 0.12, (3, 1, 1))
        if lamp:
            light += np.array(lamp)[:, None, None]
        image *= np.exp(light)
        grain = np.random.Generator(np.random.PCG64([int(rng.integers(2**31)), round(1e6 * time)]))
        image += 0.02 * grain.standard_normal(image.shape, np.float32)
        pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Scene(
            np.ascontiguousarray(pixels.transpose(1, 2, 0)), label, canvas.mask, canvas.instances, depth
        )

    def _ground(self, rng: np.random.Generator, depth: Floats) -> Floats:
        """Floor and wall (3, S, S), in blotches of several colours: none of them identifies the image."""
        coarse, fine = _noise(rng, self.coarse, 4), _noise(rng, self.fine, 1)[0]
        paint = _colours(rng, rng.uniform(0, 1, 5), (0.0, 0.35), (0.35, 0.65))[:, :, None, None]
        wall = depth >= WALL
        share = np.clip(0.5 + np.where(wall, coarse[0], coarse[1]), 0, 1)
        image = np.where(
            wall, paint[0] + share * (paint[2] - paint[0]), paint[1] + share * (paint[3] - paint[1])
        )
        image += np.clip(1.5 * coarse[2] - 1, 0, 1) * (paint[4] - image)
        image *= 1 + 0.1 * fine + 0.1 * coarse[3]
        self._pebbles(rng, image)
        return image

    def _pebbles(self, rng: np.random.Generator, image: Floats) -> None:
        x, y = rng.uniform(-1, 1, (2, PEBBLES)).tolist()
        angle, opacity = rng.uniform(0, math.pi, PEBBLES).tolist(), rng.uniform(0.3, 0.8, PEBBLES).tolist()
        long, wide = (
            np.exp(rng.uniform(-1.9, -0.6, PEBBLES)).tolist(),
            rng.uniform(0.04, 0.12, PEBBLES).tolist(),
        )
        paint = _colours(rng, rng.uniform(0, 1, PEBBLES), (0.1, 0.7), (0.2, 1.0))[:, :, None, None]
        for k in range(PEBBLES):
            dx, dy = self.x - x[k], self.y - y[k]
            cos, sin = math.cos(angle[k]), math.sin(angle[k])
            edge = ((cos * dx + sin * dy) / long[k]) ** 2 + ((cos * dy - sin * dx) / wide[k]) ** 2
            image += np.clip(2 - 2 * edge, 0, 1) * opacity[k] * (paint[k] - image)

    def _paint(self, canvas: Canvas, thing: Object, number: int, view: View) -> None:
        """Draw an object and its shadow on the floor, in the box of pixels that contains them."""
        x, y, radius, angle = _pose(thing, view.horizon, view.time)
        distance = _moved(thing, view.time)[1]
        reach = 1.45 * radius * max(1.0, thing.squash)
        columns, rows = (self._pixels(middle - reach, middle + reach) for middle in (x, y))
        dx, dy = (self.x[:, columns] - x) / radius, (self.y[rows] - y) / radius / thing.squash
        if not dx.size or not dy.size:
            return
        image = canvas.image[:, rows, columns]
        image *= 1 - 0.45 * np.exp(-2.5 * ((dx - 0.25 * view.light[0]) ** 2 + ((dy - 0.9) / 0.28) ** 2))
        cos, sin = math.cos(angle), math.sin(angle)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        r = np.hypot(u, v)
        inside = _outline(thing, np.arctan2(v, u)) - r
        cover = np.clip(0.5 + inside * radius * self.size / 2, 0, 1)
        shade = 1.05 - 0.35 * np.minimum(r, 1.2) ** 2 + 0.15 * (view.light[0] * dx + view.light[1] * dy)
        shade = np.where(inside < 0.1, 0.75 * shade, shade)  # a dark rim
        paint = thing.paint[:, :, None, None]
        lit = (paint[0] + self._material(thing, u, v, r, radius) * (paint[1] - paint[0])) * shade
        lit += _fog(distance) * (view.haze - lit)
        image += cover * (lit - image)
        visible = cover >= 0.5
        canvas.mask[rows, columns][visible] = 1 + thing.kind
        canvas.instances[rows, columns][visible] = number
        canvas.depth[rows, columns][visible] = distance

    def _pixels(self, low: float, high: float) -> slice:
        low, high = ((side + 1) / 2 * self.size for side in (low, high))
        return slice(max(0, math.floor(low)), max(0, math.ceil(high)))

    def _material(self, thing: Object, u: Floats, v: Floats, r: Floats, radius: float) -> Floats:
        """The share of the second colour, with the material bent a little as around a ball."""
        zoom = TILE / PERIODS / thing.pitch  # pixels of the picture over the radius
        blur = int(np.searchsorted([6, 11], zoom * 2 / self.size / radius))  # by its pixels per image pixel
        cos, sin = zoom * math.cos(thing.turn), zoom * math.sin(thing.turn)
        bulge = 1 + 0.12 * r * r
        row = ((sin * u + cos * v) * bulge + thing.shift[0]).astype(np.int32) % TILE
        column = ((cos * u - sin * v) * bulge + thing.shift[1]).astype(np.int32) % TILE
        return self.materials[thing.kind, blur][row, column]


def _place_objects(rng: np.random.Generator, kinds: list[int]) -> list[Object]:
    """Objects of these kinds, farthest first; each stands where those before it hide it least."""
    n = len(kinds)
    strata = (np.arange(n)[::-1] + rng.uniform(0.1, 0.9, n)) / n
    distances = (NEAR * (FAR / NEAR) ** strata).tolist()
    objects: list[Object] = []
    for kind, distance, paint in zip(kinds, distances, _paints(rng, n), strict=True):
        places = rng.uniform(-0.8, 0.8, 6).tolist()
        gaps = [min([abs(x - other.x) for other in objects[-3:]], default=1.0) for x in places]
        speed = rng.uniform(-1, 1, 3) * (0.35, 0.35, 0.8)
        objects.append(
            Object(
                kind=kind,
                distance=distance,
                x=places[int(np.argmax(gaps))],
                radius=rng.uniform(0.95, 1.2),
                angle=rng.uniform(-0.3, 0.3),
                squash=math.exp(rng.uniform(-0.15, 0.15)),
                waves=tuple((rng.uniform(0, 0.07), rng.uniform(0, 2 * math.pi)) for _ in range(2)),
                pitch=KINDS[kind].pitch * rng.uniform(0.85, 1.15) * math.sqrt(distance / 2.8),
                turn=rng.uniform(-0.4, 0.4),
                shift=(rng.uniform(0, TILE), rng.uniform(0, TILE)),
                paint=paint,
                speed=tuple(speed.tolist()),
            )
        )
    return objects


def _moved(thing: Object, time: float) -> tuple[float, float, float]:
    """Its x, distance and angle at a time of a clip."""
    x, distance, angle = (time * change for change in thing.speed)
    return thing.x + x, thing.distance + distance, thing.angle + angle


def _pose(thing: Object, horizon: float, time: float) -> tuple[float, float, float, float]:
    """The x and y of its middle, its radius and its angle in the image; its foot is on the floor."""
    x, distance, angle = _moved(thing, time)
    radius = thing.radius / distance
    return x, horizon + CAMERA / distance - 0.95 * radius * thing.squash, radius, angle


def _outline(thing: Object, angle: Floats) -> Floats:
    """The distance of the outline from the middle in units of the radius, in the directions `angle`."""
    lobes = KINDS[thing.kind].lobes
    edge = np.ones_like(angle)
    if lobes:
        edge += 0.22 * np.cos(lobes * angle)
    for k, (amplitude, phase) in enumerate(thing.waves, start=2):
        edge += amplitude * np.cos(k * angle + phase)
    return edge


def _fog(distance: Floats | float) -> Floats:
    return (1 - np.exp(-np.asarray(distance, np.float32) / HAZE)).astype(np.float32)


def _bumps(size: int, cells: int) -> Floats:
    """(S, cells): spreads the values of a coarse grid over the pixels by Gaussian bumps."""
    place = (np.arange(size) + 0.5) / size * (cells - 1)
    bumps = np.exp(-0.5 * ((place[:, None] - np.arange(cells)) / 0.55) ** 2)
    # Rows of unit length make the variance of the noise one everywhere, also between grid points.
    return (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)


def _noise(rng: np.random.Generator, bumps: Floats, n: int) -> Floats:
    """Smooth noise (n, S, S) of unit variance."""
    cells = bumps.shape[1]
    values: Floats = rng.standard_normal((n, cells, cells), dtype=np.float32)
    return np.asarray(bumps @ values @ bumps.T, np.float32)


def _colours(
    rng: np.random.Generator,
    hues: NDArray[np.float64],
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> Floats:
    """RGB colours (n, 3) in [0, 1] of hues (n,) in turns, with saturation and value from these ranges."""
    n = len(hues)
    s, v = rng.uniform(*saturation, (n, 1)), rng.uniform(*value, (n, 1))
    k = (np.array([5, 3, 1]) + 6 * hues[:, None]) % 6
    return (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def _paints(rng: np.random.Generator, n: int) -> Floats:
    """Pairs of colours (n, 2, 3), a light and a dark one in random order; hues go round the colour circle."""
    hues = ((rng.permutation(2 * n) + rng.uniform(0, 1, 2 * n)) / (2 * n)).reshape(2, n)
    light, dark = (
        _colours(rng, hues[0], (0.1, 0.6), (0.75, 1.0)),
        _colours(rng, hues[1], (0.1, 0.7), (0.1, 0.4)),
    )
    first = rng.random((n, 1)) < 0.5
    return np.stack([np.where(first, light, dark), np.where(first, dark, light)], axis=1).astype(np.float32)
