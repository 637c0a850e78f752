"""Clips in files: a video, or a folder of images, one a frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dinokit.data.clips import Clip, natural
from dinokit.data.decode import SUFFIXES as IMAGES
from dinokit.data.decode import decode
from dinokit.data.video import FPS, frame_times, frames_at, is_video
from dinokit.runtime.files import read_regular


@dataclass(frozen=True)
class VideoClip:
    """The frames of a video file between two times in seconds; `end` belongs to it."""

    path: Path
    label: int
    start: float = 0.0
    end: float = float("inf")

    @property
    def name(self) -> str:
        whole = self.start == 0 and self.end == float("inf")
        return f"{self.path}{'' if whole else f', {self.start:g} to {self.end:g} s'}"

    def __len__(self) -> int:
        return len(self._range)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(n, H, W, 3) uint8; see Clip."""
        return frames_at(self.path, [self._range[i] for i in indices])

    def seconds(self, indices: Sequence[int]) -> list[float]:
        """By the time stamps of the file, which need not be equally far apart."""
        return [self._times[self._range[i]] for i in indices]

    @cached_property
    def _times(self) -> list[float]:
        return frame_times(self.path)

    @cached_property
    def _range(self) -> list[int]:
        first = self._times[0]  # 0 is the first frame, whatever its stamp is
        found = [i for i, t in enumerate(self._times) if self.start <= round(t - first, 6) <= self.end]
        if not found:
            last = self._times[-1] - first
            raise ValueError(
                f"{self.path} has no frame from {self.start:g} to {self.end:g} seconds: its frames are shown "
                f"from 0 to {last:.3f}."
            )
        return found


@dataclass(frozen=True)
class FrameFolder:
    """Images in a folder, sorted by the numbers in their names. They are taken to be shown 25 a second."""

    path: Path
    label: int
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(n, H, W, 3) uint8; see Clip."""
        images = {i: self._image(self.files[i]) for i in sorted(set(indices))}
        shapes = {image.shape: self.files[i].name for i, image in images.items()}
        if len(shapes) > 1:
            found = ", ".join(f"{name} has {h} x {w}" for (h, w, _), name in shapes.items())
            raise ValueError(f"The frames in {self.path} are not equally large: {found} pixels.")
        return np.stack([images[i] for i in indices])

    def seconds(self, indices: Sequence[int]) -> list[float]:
        """As at 25 frames a second."""
        return [i / FPS for i in indices]

    @staticmethod
    def _image(path: Path) -> np.ndarray:
        image = np.asarray(decode(read_regular(path), str(path), 3, orient="stored"))
        if image.dtype != np.uint8:
            raise ValueError(f"{path} has {image.dtype} pixels: frames of clips have 8 bits.")
        return image


def clip_at(path: Path, label: int = -1) -> Clip | None:
    """The clip at a path: a video file, or a folder with images; None if it is neither."""
    if path.is_file():
        return VideoClip(path, label) if is_video(path) else None
    if not path.is_dir():
        return None
    files = [file for file in path.iterdir() if file.suffix.lower() in IMAGES and file.is_file()]
    return (
        FrameFolder(path, label, tuple(sorted(files, key=lambda file: natural(file.name)))) if files else None
    )


def clip_frames(path: Path, count: int) -> list[np.ndarray]:
    """`count` frames (H, W, 3) uint8, at even steps from the first to the last; a short clip repeats some.

    Raises:
        ValueError: if there is no video file and no folder of images at the path.
        OSError, ValueError: if it cannot be read.
    """
    clip = clip_at(path)
    if clip is None:
        raise ValueError(f"{path} is no video and no folder of images.")
    return list(clip.frames(np.linspace(0, len(clip) - 1, count).round().astype(int).tolist()))
