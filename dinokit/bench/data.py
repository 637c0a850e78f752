"""The speed of the data path on one core: decode, cut, colour; and what loader processes hand over."""

import io
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinokit import heap, shelves
from dinokit.config import Recipe
from dinokit.data.batch import collate
from dinokit.data.decode import decode
from dinokit.data.loader import CROPS, Places, loader
from dinokit.data.order import generator
from dinokit.data.photometric import Photometric
from dinokit.data.sources import Picture, Source

IMAGES = 32  # a round


def bench_data(recipe: Recipe, rounds: int, real: bool) -> dict[str, Any]:
    """Images per second of each part and of the whole, medians over the rounds, on one thread.

    Args:
        recipe: its crops, its data and its number of workers.
        rounds: of 32 images each.
        real: whether to read the recipe's data; else JPEG files of 500 x 375 pixels in memory.
    """
    torch.set_num_threads(1)
    heap.keep_freed(recipe.run.keep_memory)  # as in a process that trains on a CPU, and colours
    source: Source = shelves.build("data.sources", recipe.data) if real else Jpegs()
    places = Places(source, recipe.crops, None, recipe.run.seed, IMAGES)
    colour = Photometric(recipe.crops, compiled=recipe.run.compiles("colour"))
    taken = [_round(places, colour, step) for step in range(rounds + 1)][1:]
    rates = {name: IMAGES / median(times[name] for times in taken) for name in taken[0]}
    return {"images_per_second": rates, "loader": _loader_rate(source, recipe, rounds)}


def _round(places: Places, colour: Photometric, step: int) -> dict[str, float]:
    """Seconds that each part takes for the images of a round."""
    numbers = [(step * IMAGES + i) % len(places.source) for i in range(IMAGES)]
    rngs = [generator(places.seed, step, place, CROPS) for place in range(IMAGES)]
    marks = [time.perf_counter()]
    pictures = [places.picture(i, rng) for i, rng in zip(numbers, rngs, strict=True)]
    marks.append(time.perf_counter())
    for image, boxes in pictures:
        places.cut(image, boxes)
    marks.append(time.perf_counter())
    batch = collate([places[step, place] for place in range(IMAGES)])
    marks.append(time.perf_counter())
    for crops, rows in ((batch.global_crops, batch.global_colour), (batch.local_crops, batch.local_colour)):
        if len(crops):
            colour(crops, rows)
    marks.append(time.perf_counter())
    decode_, cut, both, coloured = (end - begun for begun, end in pairwise(marks))
    return {"decode": decode_, "cut": cut, "colour": coloured, "decode and cut": both, "all": both + coloured}


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

    classes: Sequence[str] = ()

    def __init__(self) -> None:
        self.files = [_jpeg(np.random.default_rng(seed)) for seed in range(16)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return decode(self.stored(index), self.name(index), 3), -1

    def stored(self, index: int) -> bytes:
        """The file."""
        return self.files[index]

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
