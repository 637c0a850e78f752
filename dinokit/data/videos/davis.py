"""DAVIS 2017 as it is delivered (Pont-Tuset et al., arXiv 1704.00675), and data in the same layout.

H, W  of a frame
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import decode, decode_map
from dinokit.data.sources import ImageLike
from dinokit.data.videos import Video
from dinokit.runtime.files import read_regular

VOID = 255  # pixels that are neither an object nor background


@dataclass
class Config:
    path: str = "???"  # a folder laid out as DAVIS 2017
    list: str = "val"  # of videos, in ImageSets/2017; without that folder, all videos
    resolution: str = "480p"  # name of the folders


@dataclass(frozen=True)
class FileVideo:
    """The frames of one video and their masks."""

    name: str
    frames: list[Path]
    masks: list[Path]  # one per frame

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int, channels: int) -> ImageLike:
        """The image."""
        path = self.frames[index]
        return decode(read_regular(path), str(path), channels, orient="stored")  # as its masks

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8: 0 background, then the objects."""
        path = self.masks[index]
        ids = decode_map(read_regular(path), str(path))
        return np.where(ids == VOID, 0, ids).astype(np.uint8)


def build(cfg: Config) -> list[Video]:
    """The videos that ImageSets/2017/NAMES.txt lists, or all, if there is no such folder.

    Raises:
        ValueError: if a folder is missing, a list is empty, or a frame has no mask.
    """
    root, names, resolution = Path(cfg.path).expanduser(), cfg.list, cfg.resolution
    images, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(
                f"path='{root}' is not laid out as DAVIS 2017: there is no {folder.relative_to(root)}. The "
                f"frames of a video must be in JPEGImages/{resolution}/VIDEO, its masks in "
                f"Annotations/{resolution}/VIDEO."
            )
    have = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    lists = root / "ImageSets" / "2017"
    selected = have
    if lists.is_dir():
        known = sorted(path.stem for path in lists.glob("*.txt"))
        if names not in known:
            near = suggest(names, known)
            raise ValueError(f"{lists} has no list '{names}'.{near} It has: {', '.join(known)}.")
        selected = (lists / f"{names}.txt").read_text(encoding="utf-8").split()
    if not selected:
        raise ValueError(f"path='{root}' names no video.")
    return [_video(images, masks, name, have) for name in selected]


def _video(images: Path, masks: Path, name: str, have: list[str]) -> FileVideo:
    if name not in have:
        raise ValueError(f"{images} has no video '{name}'.{suggest(name, have)}")
    frames = sorted(path for path in (images / name).iterdir() if path.suffix.lower() in (".jpg", ".png"))
    mask_files = [masks / name / f"{path.stem}.png" for path in frames]
    missing = [str(path) for path in mask_files if not path.is_file()]
    if missing or len(frames) < 3:
        raise ValueError(
            f"{len(missing)} of {len(frames)} frames have no mask, the first being {missing[0]}."
            if missing
            else f"{images / name} has {len(frames)} frames; the first and the last are not evaluated."
        )
    return FileVideo(name, frames, mask_files)
