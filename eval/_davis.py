"""DAVIS 2017 on disk (Pont-Tuset et al., arXiv 1704.00675), and its two measures.

T  frames     O  objects     H, W  of a frame
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit import shelves
from dinokit.data.decode import decode, decode_map
from dinokit.data.sources import Picture

BOUND = 0.008  # of the diagonal: how far apart two outlines may lie and still be one
NOTHING = 255  # the number of pixels that belong to no object and are not the background either


@dataclass(frozen=True)
class Sequence:
    """The frames of one video and the masks of those that have one."""

    name: str
    frames: list[Path]
    masks: list[Path]  # one a frame

    def frame(self, index: int, channels: int) -> Picture:
        """The image."""
        path = self.frames[index]
        return decode(path.read_bytes(), str(path), channels)

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8: 0 background, then the objects."""
        path = self.masks[index]
        ids = decode_map(path.read_bytes(), str(path))
        return np.where(ids == NOTHING, 0, ids).astype(np.uint8)


def sequences(root: Path, names: str, resolution: str) -> list[Sequence]:
    """The videos that ImageSets/2017/NAMES.txt lists, or all, if there is no such folder.

    Raises:
        ValueError: if a folder is not there, a list is empty, or a frame has no mask.
    """
    images, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(
                f"path='{root}' is not laid out as DAVIS 2017: there is no {folder.relative_to(root)}. The "
                f"frames of a video lie in JPEGImages/{resolution}/VIDEO, its masks in "
                f"Annotations/{resolution}/VIDEO."
            )
    have = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    lists = root / "ImageSets" / "2017"
    wanted = have
    if lists.is_dir():
        there = sorted(path.stem for path in lists.glob("*.txt"))
        if names not in there:
            near = shelves.suggest(names, there)
            raise ValueError(f"{lists} has no list '{names}'.{near} It has: {', '.join(there)}.")
        wanted = (lists / f"{names}.txt").read_text(encoding="utf-8").split()
    if not wanted:
        raise ValueError(f"path='{root}' names no video.")
    return [_sequence(images, masks, name, have) for name in wanted]


def _sequence(images: Path, masks: Path, name: str, have: list[str]) -> Sequence:
    if name not in have:
        raise ValueError(f"{images} has no video '{name}'.{shelves.suggest(name, have)}")
    frames = sorted(path for path in (images / name).iterdir() if path.suffix.lower() in (".jpg", ".png"))
    truths = [masks / name / f"{path.stem}.png" for path in frames]
    missing = [str(path) for path in truths if not path.is_file()]
    if missing or len(frames) < 3:
        raise ValueError(
            f"{len(missing)} of {len(frames)} frames have no mask, the first being {missing[0]}."
            if missing
            else f"{images / name} has {len(frames)} frames; the first and the last are not judged."
        )
    return Sequence(name, frames, truths)


def region(given: Tensor, truth: Tensor) -> float:
    """J: the intersection over the union of two masks (H, W) bool; 1 if both are empty."""
    union = (given | truth).sum().item()
    return (given & truth).sum().item() / union if union else 1.0


def contour(given: Tensor, truth: Tensor) -> float:
    """F: the harmonic mean of precision and recall of the outline of `given`, both masks (H, W) bool.

    A point of one outline is found if the other has one within 0.008 of the diagonal, rounded up to a pixel.
    If neither has an outline it is 1, if one has none, 0.
    """
    reach = math.ceil(BOUND * math.hypot(*truth.shape))
    ours, theirs = outline(given), outline(truth)
    counts = ours.sum().item(), theirs.sum().item()
    if not all(counts):
        return float(not any(counts))
    precision = (ours & thickened(theirs, reach)).sum().item() / counts[0]
    recall = (theirs & thickened(ours, reach)).sum().item() / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: Tensor) -> Tensor:
    """Pixels of (H, W) bool that differ from the one to the right, below, or across; (H, W) bool."""
    wide = F.pad(mask[None, None].float(), (0, 1, 0, 1), mode="replicate")[0, 0] > 0
    here = wide[:-1, :-1]
    return (here ^ wide[:-1, 1:]) | (here ^ wide[1:, :-1]) | (here ^ wide[1:, 1:])


def thickened(mask: Tensor, reach: int) -> Tensor:
    """All pixels within `reach` of one of (H, W) bool."""
    axis = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (axis[:, None].square() + axis.square() <= reach**2).float()
    return F.conv2d(mask[None, None].float(), disc[None, None], padding=reach)[0, 0] > 0.5
