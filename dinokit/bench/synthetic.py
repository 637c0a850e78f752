"""Images that need no data set: photo-like, of the size of many, as files in memory."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dinokit.data.decode import decode
from dinokit.data.sources import ImageLike


class Files:
    """Sixteen pictures of 500 x 375 pixels: JPEG in grey or RGB, as it has no other channels; else `.npy`."""

    classes: Sequence[str] = ()

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.files = [_file(np.random.default_rng(seed), channels) for seed in range(16)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return decode(self.stored(index), self.name(index), self.channels), -1

    def stored(self, index: int) -> bytes:
        """The file."""
        return self.files[index]

    def name(self, index: int) -> str:
        """For messages."""
        return f"synthetic image {index}"


def _file(rng: np.random.Generator, channels: int) -> bytes:
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    fall = 1 / np.maximum(frequency, 1 / width)  # amplitude over frequency, as in photographs
    noise = np.fft.rfft2(rng.standard_normal((channels, height, width)))
    detail = np.fft.irfft2(noise * fall, s=(height, width))
    detail = 128 + 55 * detail / detail.std()
    pixels = detail.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
    file = io.BytesIO()
    if channels in (1, 3):
        Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=90)
    else:
        np.save(file, pixels)
    return file.getvalue()
