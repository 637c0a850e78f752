"""NAVI (Jampani et al. 2023, arXiv 2306.09109) as it is delivered, and data in the same layout.

OBJECT/COLLECTION/{annotations.json, images/NAME.jpg, depth/NAME.png}, and the published pairs in
custom_splits/pairwise_pixel_correspondences/pairs-{wild_set,multiview}.txt, a line 'IMAGE IMAGE DEGREES' with
paths below the folder. Images of a pair show one object from two sides. Its points are computed: a pixel with
depth in the first image is a point of the object, which the second camera sees at another place unless its
own depth there says that something is in front.

Depth is 16-bit disparity: 655,350 over the value is millimetres, and 0 is no object. A camera has its axes to
the right, down and forward, and its principal point in the middle; x = R(q) X + t.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinokit.config.registry import check_at_least
from dinokit.data.decode import decode, decode_map
from dinokit.data.files import check_below, existing
from dinokit.data.pairs import Pair
from dinokit.data.transforms import size_of
from dinokit.runtime.files import read_regular

LISTS = "custom_splits/pairwise_pixel_correspondences"
DISPARITY = 10 * (2**16 - 1)  # millimetres times the stored value
SAME = 0.01  # share of its depth by which a point may differ from the surface that is seen at its place


@dataclass
class Config:
    path: str = "???"  # the folder of NAVI, with custom_splits in it
    layout: Literal["wild_set", "multiview"] = "wild_set"  # other backgrounds and light, or one scene
    angle: float = 120.0  # degrees between the cameras of a pair: the largest
    points: int = 100  # pixels of the first image's object, spread evenly; fewer are visible in both
    split: Literal["test"] = "test"  # the pairs are one list
    channels: int = 3  # as backbone.channels

    def __post_init__(self) -> None:
        check_at_least(self, points=1, angle=0)


@dataclass(frozen=True)
class View:
    """One image of an object: its depth in millimetres (h, w), 0 without object, and its camera."""

    depth: np.ndarray
    focal: float  # pixels of the depth map
    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,) millimetres

    def object_points(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `count` pixels (n, 2) with depth, x and y of their middles, and these points (n, 3)."""
        rows, columns = np.nonzero(self.depth)
        chosen = np.arange(min(count, len(rows))) * len(rows) // max(min(count, len(rows)), 1)
        rows, columns = rows[chosen], columns[chosen]
        pixels = np.stack([columns, rows], axis=1) + 0.5
        z = self.depth[rows, columns][:, None]
        seen = np.concatenate([(pixels - self._middle) / self.focal * z, z], axis=1)
        return pixels, (seen - self.translation) @ self.rotation  # the inverse of a rotation is its transpose

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels (n, 2) of points (n, 3), and whether each is visible (n,)."""
        seen = points @ self.rotation.T + self.translation
        z = np.maximum(seen[:, 2], 1e-6)
        pixels = seen[:, :2] / z[:, None] * self.focal + self._middle
        height, width = self.depth.shape
        columns, rows = np.floor(pixels).astype(np.int64).T
        inside = (columns >= 0) & (rows >= 0) & (columns < width) & (rows < height) & (seen[:, 2] > 0)
        there = np.where(inside, self.depth[np.where(inside, rows, 0), np.where(inside, columns, 0)], 0.0)
        return pixels, inside & (there > 0) & (np.abs(there - seen[:, 2]) <= SAME * seen[:, 2])

    @property
    def _middle(self) -> np.ndarray:
        return np.array([self.depth.shape[1], self.depth.shape[0]]) / 2

    @property
    def side(self) -> float:
        """The longer side of the object's box, in pixels of the depth map; 0 without object."""
        rows, columns = np.nonzero(self.depth)
        return float(1 + max(np.ptp(rows), np.ptp(columns))) if len(rows) else 0.0


class Navi:
    def __init__(self, cfg: Config) -> None:
        """Read the list of pairs.

        Raises:
            ValueError: if it does not exist, is damaged, or has no pair within `angle`.
        """
        self.cfg, self._root = cfg, existing(cfg.path)
        listed = self._root / LISTS / f"pairs-{cfg.layout}.txt"
        if not listed.is_file():
            raise ValueError(
                f"path='{self._root}' is not laid out as NAVI: there is no {listed.relative_to(self._root)}. "
                f"It lists pairs, a line 'IMAGE IMAGE DEGREES' each, of OBJECT/COLLECTION/images/NAME.jpg."
            )
        self._pairs: list[tuple[str, str]] = []
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            try:
                first, second, degrees = words
                near = float(degrees) <= cfg.angle
            except ValueError:
                if words:
                    text = f"{listed}, line {number}, is no 'IMAGE IMAGE DEGREES': {line.strip()[:80]}."
                    raise ValueError(text) from None
                continue
            for name in (first, second):
                check_below(name, listed)
            self._pairs += [(first, second)] if near else []
        if not self._pairs:
            raise ValueError(f"{listed} lists no pair with at most angle={cfg.angle:g} degrees.")
        self._annotations = lru_cache(64)(_annotations)  # neighbours in the list share files

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        """Two images, RGB, and the points of the object that both cameras see."""
        paths = [self._root / name for name in self._pairs[index]]
        images = [decode(read_regular(path), str(path), self.cfg.channels) for path in paths]
        one, two = (self._view(path) for path in paths)
        first, places = one.object_points(self.cfg.points)
        second, visible = two.project(places)
        scales = [
            np.array(size_of(image)) / np.array(view.depth.shape[::-1])
            for image, view in zip(images, (one, two), strict=True)
        ]
        points = np.stack([first[visible] * scales[0], second[visible] * scales[1]])
        return Pair(images[0], images[1], points, np.full(points.shape[1], two.side * float(scales[1].max())))

    def name(self, index: int) -> str:
        """The paths of the two images."""
        return " and ".join(str(self._root / name) for name in self._pairs[index])

    def _view(self, path: Path) -> View:
        folder = path.parent.parent
        about, file = self._annotations(folder / "annotations.json"), folder / "annotations.json"
        if path.name not in about:
            raise ValueError(f"{file} has no camera of the image {path.name}.")
        stored = decode_map(
            read_regular(folder / "depth" / f"{path.stem}.png"), f"{folder / 'depth' / path.stem}.png"
        )
        depth = np.where(stored > 0, DISPARITY / np.maximum(stored.astype(np.float64), 1), 0.0)
        try:
            camera = about[path.name]["camera"]
            width = float(about[path.name]["image_size"][1])
            focal = float(camera["focal_length"]) * depth.shape[1] / width
            return View(depth, focal, rotation(camera["q"]), np.array(camera["t"], np.float64).reshape(3))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"{file}: the camera of {path.name} is none as NAVI has them: {error!r}."
            ) from None


def rotation(q: Any) -> np.ndarray:
    """The matrix (3, 3) of a quaternion (w, x, y, z) of any length.

    Raises:
        ValueError: if the length is 0, or q is not four numbers.
    """
    given = np.array(q, np.float64).reshape(4)
    if not np.linalg.norm(given):
        raise ValueError("a quaternion of length 0 is no rotation")
    w, x, y, z = given / np.linalg.norm(given)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def _annotations(file: Path) -> dict[str, dict[str, Any]]:
    """The annotations of a collection, by file name of the image."""
    try:
        return {str(each["filename"]): each for each in json.loads(read_regular(file))}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} has no annotations as NAVI has them: {error!r}.") from None


build = Navi
