"""Measures the data path on one core (decode, crop, colour), and the machine's rate of matrix products."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.batch import CROPS, TrainDataset, collate
from dinokit.data.decode import decode
from dinokit.data.loader import training_loader
from dinokit.data.sampler import generator
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.runtime.device import keep_freed_memory, pick_device, pick_precision

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed
SLOW = 5.0  # seconds: a product that would take longer is not timed
RATES = {"matmul_fp32": torch.float32, "matmul_bf16": torch.bfloat16}


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the device and the precision that `auto` is here.

    Raises:
        ValueError: if there is no such device here.
    """
    device = pick_device(recipe.run.device)
    precision = pick_precision(recipe.run.precision, device)
    return replace(recipe, run=replace(recipe.run, device=str(device), precision=precision))


def measured_on(device: str, precision: str) -> dict[str, Any]:
    """For a report: these two, and the threads that this process computes with."""
    return {"device": device, "precision": precision, "threads": torch.get_num_threads()}


def seconds(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """The median time of `work`, s, the device having finished."""
    for _ in range(warm_up):
        work()
    return median(once(work, device) for _ in range(repeats))


def once(work: Callable[[], object], device: torch.device) -> float:
    """The time of one call of `work`, s, the device having finished."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each column."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def matmul_rates(device: torch.device) -> dict[str, float]:
    """matmul_rate() by the name that it has in reports."""
    return {name: matmul_rate(dtype, device) for name, dtype in RATES.items()}


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product: the best of three, as the rest is lost to other programs.

    Only a small product is timed where the large one would take minutes: bf16 on a CPU without it.
    """
    large = SIDE.get(device.type, 2048)
    for side in (256, large):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(once(lambda: a @ b, device) for _ in range(3))  # noqa: B023
        if seconds * (large / side) ** 3 > SLOW:
            break
    return float(2 * side**3 / seconds)


def bench_data(recipe: Recipe, rounds: int, real: bool) -> dict[str, Any]:
    """Images per second of each part and of the whole, medians over the rounds, on one thread of the CPU.

    Args:
        recipe: its crops, its data and its number of workers.
        rounds: of optim.batch images each, and the thread's rate of matrix products after each.
        real: whether to read the recipe's data; else files in memory, SyntheticImages.
    """
    torch.set_num_threads(1)
    keep_freed_memory(recipe.run)  # as in a process that trains on a CPU
    source: ImageSource = (
        registry.build("data.sources", recipe.data) if real else SyntheticImages(len(recipe.crops.mean))
    )
    places = TrainDataset(source, recipe.crops, None, recipe.run.seed, recipe.optim.batch)
    colour = Photometric(recipe.crops, compiled=recipe.run.compiles("colour"))
    _round(places, colour, 0)
    times, rates = [], []
    for step in range(1, rounds + 1):
        times.append(_round(places, colour, step))
        rates.append(matmul_rates(torch.device("cpu")))
    return {
        **measured_on("cpu", "fp32"),
        "images_per_second": {name: places.batch / elapsed for name, elapsed in medians(times).items()},
        "loader": _loader_rate(source, recipe, rounds),
        **medians(rates),
    }


def _round(places: TrainDataset, colour: Photometric, step: int) -> dict[str, float]:
    """Seconds that each part takes for the images of a round."""
    numbers = [(step * places.batch + i) % len(places.source) for i in range(places.batch)]
    rngs = [generator(places.seed, step, place, CROPS) for place in range(places.batch)]
    marks = [time.perf_counter()]
    multi_crop = places.multi_crops[places.variant(step)]
    pictures = [places.read_image(i, multi_crop, rng) for i, rng in zip(numbers, rngs, strict=True)]
    marks.append(time.perf_counter())
    for image, boxes in pictures:
        multi_crop(image, boxes)
    marks.append(time.perf_counter())
    batch = collate([places[step, place] for place in range(places.batch)])
    marks.append(time.perf_counter())
    for crops, rows in ((batch.global_crops, batch.global_colour), (batch.local_crops, batch.local_colour)):
        if len(crops):
            colour(crops, rows)
    marks.append(time.perf_counter())
    decode_, cut, both, coloured = (end - begin for begin, end in pairwise(marks))
    return {"decode": decode_, "cut": cut, "colour": coloured, "decode and cut": both, "all": both + coloured}


def _loader_rate(source: ImageSource, recipe: Recipe, rounds: int) -> dict[str, float]:
    """What the loader hands over when nobody takes its time: the start, s, and images per second after it."""
    begin = time.perf_counter()
    batches = iter(
        training_loader(
            source, recipe.crops, None, seed=recipe.run.seed, start_step=0, steps=rounds + 4,
            batch=recipe.optim.batch, workers=recipe.run.workers,
        )
    )  # fmt: skip
    next(batches)
    start = time.perf_counter() - begin
    begin = time.perf_counter()
    handed = sum(batch.images for batch in batches)
    return {"start_s": start, "images_per_second": handed / (time.perf_counter() - begin)}


class SyntheticImages:
    """Sixteen photo-like images of 500 x 375 pixels in memory: JPEG in grey or RGB, else `.npy`."""

    classes: Sequence[str] = ()

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.files = [_file(np.random.default_rng(seed), channels) for seed in range(16)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return decode(self.stored(index), self.name(index), self.channels), -1

    def stored(self, index: int) -> bytes:
        """The bytes of the file."""
        return self.files[index]

    def name(self, index: int) -> str:
        """A name for messages."""
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
