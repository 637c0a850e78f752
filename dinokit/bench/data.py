"""The speed of the data path on one core: decode, cut, colour; and what loader processes hand over."""

import io
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinokit import shelves
from dinokit.config import Recipe
from dinokit.data.batch import collate
from dinokit.data.decode import decode
from dinokit.data.loader import CROPS, Places, loader
from dinokit.data.order import generator
from dinokit.data.photometric import Photometric
from dinokit.data.sources import Picture, Source

IMAGES = 32  # a round


def bench_data(recipe: Recipe, rounds: int, real: bool) -> dict[str, Any]:
    """Images per second of each part and of the whole, medians over the rounds, in this process on one thread.

    Args:
        recipe: its crops, its data and its number of workers.
        rounds: of 32 images each.
        real: whether to read the recipe's data; else JPEG files of 500 x 375 pixels in memory.
    """
    torch.set_num_threads(1)
    source: Source = shelves.build("data.sources", recipe.data) if real else Jpegs()
    places, colour = Places(source, recipe.crops, None, recipe.run.seed, IMAGES), Photometric(recipe.crops)
    times: dict[str, list[float]] = {"decode": [], "cut": [], "colour": [], "decode and cut": [], "all": []}
    for step in range(rounds + 1):
        rngs = [generator(recipe.run.seed, step, place, CROPS) for place in range(IMAGES)]
        images, decoding = _timed(lambda step=step: [source[(step * IMAGES + i) % len(source)][0] for i in range(IMAGES)])
        _, cutting = _timed(lambda: [places.cut(x, rng) for x, rng in zip(images, rngs, strict=True)])
        batch, making = _timed(lambda step=step: collate([places[step, place] for place in range(IMAGES)]))
        _, colouring = _timed(
            lambda: [
                colour(batch.global_crops, batch.global_colour),
                colour(batch.local_crops, batch.local_colour),
            ]
        )
        parts = decoding, cutting, colouring, making, making + colouring
        for taken, seconds in zip(times.values(), parts, strict=True):
            taken.append(seconds)
    rates = {name: IMAGES / median(taken[1:]) for name, taken in times.items()}
    return {"images_per_second": rates, "loader": _loader_rate(source, recipe, rounds)}


def _loader_rate(source: Source, recipe: Recipe, rounds: int) -> dict[str, float]:
    """What the loader hands over when nobody takes its time: the start, s, and images per second after it."""
    begun = time.perf_counter()
    batches = iter(
        loader(
            source, recipe.crops, None, seed=recipe.run.seed, start_step=0, steps=rounds + 4, batch=IMAGES,
            workers=recipe.run.workers,
        )
    )  # fmt: skip
    next(batches)
    start = time.perf_counter() - begun
    begun = time.perf_counter()
    handed = sum(batch.images for batch in batches)
    return {"start_s": start, "images_per_second": handed / (time.perf_counter() - begun)}


class Jpegs:
    """Sixteen photo-like JPEG files of 500 x 375 pixels in memory: their detail falls with its frequency."""

    classes = ()

    def __init__(self) -> None:
        self.files = [_jpeg(np.random.default_rng(seed)) for seed in range(16)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return decode(self.files[index], self.name(index), 3), -1

    def name(self, index: int) -> str:
        """For messages."""
        return f"JPEG {index}"


def _jpeg(rng: np.random.Generator) -> bytes:
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    fall = 1 / np.maximum(frequency, 1 / width)  # amplitude over frequency, as in photographs
    noise = np.fft.rfft2(rng.standard_normal((3, height, width)))
    pixels = np.fft.irfft2(noise * fall, s=(height, width))
    pixels = 128 + 55 * pixels / pixels.std()
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    done = work()
    return done, time.perf_counter() - begun
