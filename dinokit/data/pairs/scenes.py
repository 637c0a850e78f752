"""The built-in scenes at two times: objects that move, turn and come nearer, under another light.

Points lie on the material of an object, which moves with it. A point is left out where it is hidden.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dinokit.config.registry import check_at_least
from dinokit.data.pairs import Pair
from dinokit.data.scenes import World

# In units of the object's radius: its middle, and two rings of six and eight points.
RINGS = ((0.0, 1), (0.35, 6), (0.7, 8))


@dataclass
class Config:
    size: int = 64  # pixels: the side of the square images, 32 or more
    pairs: int = 100
    seed: int = 0
    split: Literal["train", "test"] = "test"

    def __post_init__(self) -> None:
        check_at_least(self, size=32, pairs=1, seed=0)


class ScenePairs:
    """Pair i is the first and the last frame of clip i, the video of this number in data.videos."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._world = World(cfg.size, cfg.seed, cfg.split)
        angles = [(r, 2 * np.pi * k / n) for r, n in RINGS for k in range(n)]
        self._points = np.array([(r * np.cos(angle), r * np.sin(angle)) for r, angle in angles])

    def __len__(self) -> int:
        return self.cfg.pairs

    def __getitem__(self, index: int) -> Pair:
        """The two images, RGB, and the points of all objects.

        Raises:
            IndexError: if there is no such pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"There is no pair {index}: there are {len(self)}, counted from 0.")
        frames, tracks = self._world.clip(index, 2), self._world.tracks(index, 2, self._points)
        points, sides = [], []
        for number, track in enumerate(tracks.swapaxes(0, 1), start=1):  # (2, n, 2)
            masks = [frame.instances == number for frame in frames]
            seen = np.logical_and(*(_inside(mask, at) for mask, at in zip(masks, track, strict=True)))
            if seen.any():
                rows, columns = np.nonzero(masks[1])
                points.append(track[:, seen])
                sides += [float(1 + max(np.ptp(rows), np.ptp(columns)))] * int(seen.sum())
        first, second = (Image.fromarray(frame.image) for frame in frames)
        together = np.concatenate(points, axis=1) if points else np.zeros((2, 0, 2))
        return Pair(first, second, together, np.array(sides))

    def name(self, index: int) -> str:
        """As in 'scenes test 17'."""
        return f"scenes {self.cfg.split} {index}"


def _inside(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether points (n, 2) lie on a mask (H, W): (n,) bool."""
    columns, rows = np.floor(points).astype(int).T
    valid = (columns >= 0) & (rows >= 0) & (columns < mask.shape[1]) & (rows < mask.shape[0])
    return np.asarray(valid & mask[np.where(valid, rows, 0), np.where(valid, columns, 0)])


build = ScenePairs
