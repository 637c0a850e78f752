"""Videos as frames; animated GIF, WebP and PNG files, read and written by Pillow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinokit.data.decode import UNREADABLE, ImageLike, as_image
from dinokit.data.video import is_video, read_video
from dinokit.runtime.files import atomic
from dinokit.viz.draw import Picture

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
FORMATS = tuple(ANIMATIONS.values())
FPS = 10.0  # frames a second, of frames that do not say


def is_animated(path: str | Path) -> bool:
    """Whether a file is a video, by its name, or an image file with more than one frame."""
    return is_video(path) or _frames_of(path) > 1


def evenly(length: int, count: int) -> list[int]:
    """At most `count` numbers of 0 to `length` - 1, from the first to the last at even steps."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def read_frames(path: str | Path, channels: int, count: int) -> tuple[list[ImageLike], float]:
    """Frames of a video or an animation, at most `count` at even steps, and how many are shown in a second.

    Raises:
        ValueError: if it is damaged, or a video and PyAV is not installed.
        OSError: if it cannot be read.
    """
    if is_video(path):
        pictures, fps = read_video(path, count)
        return [as_image(picture, channels) for picture in pictures], fps
    frames: list[ImageLike] = []
    milliseconds = 0.0
    with Image.open(path, formats=FORMATS) as image:
        total = _frames_of(path)
        chosen = set(evenly(total, count))
        for number in range(total):  # one after another: each is a change of the one before
            try:
                image.seek(number)
                image.load()  # of WebP, the time of a frame is known then
                if number in chosen:
                    frames.append(as_image(image.convert("RGB"), channels))
                milliseconds += float(image.info.get("duration") or 1000 / FPS)
            except UNREADABLE as error:
                raise ValueError(f"{path} cannot be read: frame {number} of {total}: {error}") from None
    return frames, 1000 * len(frames) / milliseconds


def write_animation(path: str | Path, frames: Sequence[Picture], fps: float) -> None:
    """Write frames of one size (h, w, 3) as an animation that repeats, or one as a picture.

    Args:
        path: NAME.gif, NAME.webp or NAME.png.
        frames: one or more.
        fps: frames a second.

    Raises:
        ValueError: if the name is of another format.
        OSError: if it cannot be written.
    """
    kind = ANIMATIONS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"out={path}: an animation is written as NAME.webp, NAME.gif or NAME.png.")
    first, *rest = map(Image.fromarray, frames)
    with atomic(path) as temporary, temporary.open("wb") as file:
        first.save(file, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _frames_of(path: str | Path) -> int:
    """Frames in an image file: 1, if it is no animation or cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return int(getattr(image, "n_frames", 1))
    except UNREADABLE:
        return 1
