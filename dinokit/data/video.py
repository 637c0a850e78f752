"""Reads frames of video files by PyAV, which contains FFmpeg."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinokit.data.decode import MAX_PIXELS

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# What FFmpeg may take a file for, whatever its name is: a playlist, for one, makes it open other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,mpeg,mpegts"
FPS = 25.0  # frames a second, of a video that does not say


def is_video(path: str | Path) -> bool:
    """Whether a file is a video, by its name."""
    return Path(path).suffix.lower() in SUFFIXES


def read_video(path: str | Path, count: int, max_pixels: int = MAX_PIXELS) -> tuple[list[Image.Image], float]:
    """Frames of a video, upright and in RGB, and how many are shown in a second.

    All frames are decoded, twice, one after another, and at most `count` are kept, at even steps from the
    first to the last: frame i of `count` is number round(i * (n - 1) / (count - 1)) of n. What is not shown,
    as the start of a clip that was trimmed, is no frame.

    Args:
        path: the file.
        count: frames to keep, at least 1.
        max_pixels: of a frame; a file that has one of more is refused before such a frame is kept.

    Raises:
        ValueError: without PyAV; if it is damaged or cut short, has no pictures or too many pixels. A file of
            a format without an index, such as MPEG, ends where it was cut.
        OSError: if it cannot be read.
    """
    av = _pyav(path)
    with _named_errors(av, path):
        total = sum(1 for _ in _frames(av, path, max_pixels))
        chosen = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
        kept, rate = [], FPS
        for number, (frame, per_second) in enumerate(_frames(av, path, max_pixels)):
            if number in chosen:
                picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                kept.append(picture.rotate(frame.rotation, expand=True) if frame.rotation else picture)
                rate = per_second
    return kept, rate * len(kept) / total


def frame_times(path: str | Path, max_pixels: int = MAX_PIXELS) -> list[float]:
    """When each frame is shown, in seconds, by the time stamps of the file; all frames are decoded.

    Raises:
        ValueError, OSError: as read_video().
    """
    av = _pyav(path)
    with _named_errors(av, path):
        times: list[float] = []
        for frame, per_second in _frames(av, path, max_pixels):
            times.append(len(times) / per_second if frame.time is None else float(frame.time))
    return times


def frames_at(path: str | Path, indices: Sequence[int], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The frames with these numbers, counted from 0 in the order in which they are shown.

    The file is decoded from its start to the last of them, so that a number is always the same frame.

    Args:
        path: the file.
        indices: in any order; one may be there twice.
        max_pixels: of a frame, as in read_video().

    Returns:
        (n, H, W, 3) uint8, upright, in the order of the indices.

    Raises:
        ValueError, OSError: as read_video(); or if there is no such frame.
    """
    av = _pyav(path)
    wanted, last, number = set(indices), max(indices), -1
    found: dict[int, np.ndarray] = {}
    with _named_errors(av, path):
        for number, (frame, _) in enumerate(_frames(av, path, max_pixels)):
            if number in wanted:
                pixels = frame.to_ndarray(format="rgb24")
                found[number] = np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels
            if number == last:
                break
        if last > number or min(indices) < 0:
            raise ValueError(f"it has {number + 1} frames, and frames {sorted(wanted)} were asked for")
    return np.stack([found[i] for i in indices])


def _pyav(path: str | Path) -> Any:
    try:
        return import_module("av")
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is a video, and PyAV, which reads videos, is not installed: pip install av. Or make a "
            f"folder of its frames, and give that: ffmpeg -i {shlex.quote(str(path))} FOLDER/%05d.png"
        ) from None


@contextmanager
def _named_errors(av: Any, path: str | Path) -> Iterator[None]:
    """Errors of a damaged file with its name."""
    try:
        yield
    except (av.FFmpegError, EOFError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _frames(av: Any, path: str | Path, max_pixels: int) -> Iterator[tuple[Any, float]]:
    """The frames of a file, each with how many are shown in a second."""
    # FFmpeg would take a name with a colon for an address, on the network too.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", options=options) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        _check_pixels(stream.width, stream.height, max_pixels)
        frame = None
        for frame in container.decode(stream):
            _check_pixels(frame.width, frame.height, max_pixels)
            yield frame, float(stream.average_rate or FPS)
        if frame is None:
            raise ValueError("it has no frames")


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise ValueError(f"its frames have {width} x {height} pixels, over {most:,}")
