"""The speed of the data path on one core: decode, cut, colour; and what loader processes hand over."""

import time
from itertools import pairwise
from typing import Any

import torch

from dinokit.bench.machine import matmul_rates, measured_on, medians
from dinokit.bench.synthetic import Files
from dinokit.config import registry
from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.batch import CROPS, TrainDataset, collate
from dinokit.data.loader import training_loader
from dinokit.data.sampler import generator
from dinokit.data.sources import ImageSource
from dinokit.runtime.device import keep_freed_memory


def bench_data(recipe: Recipe, rounds: int, real: bool) -> dict[str, Any]:
    """Images per second of each part and of the whole, medians over the rounds, on one thread of the CPU.

    Args:
        recipe: its crops, its data and its number of workers.
        rounds: of optim.batch images each, and the thread's rate of matrix products after each.
        real: whether to read the recipe's data; else files in memory, as Files has them.
    """
    torch.set_num_threads(1)
    keep_freed_memory(recipe.run)  # as in a process that trains on a CPU
    source: ImageSource = (
        registry.build("data.sources", recipe.data) if real else Files(len(recipe.crops.mean))
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
        "images_per_second": {name: places.batch / took for name, took in medians(times).items()},
        "loader": _loader_rate(source, recipe, rounds),
        **medians(rates),
    }


def _round(places: TrainDataset, colour: Photometric, step: int) -> dict[str, float]:
    """Seconds that each part takes for the images of a round."""
    numbers = [(step * places.batch + i) % len(places.source) for i in range(places.batch)]
    rngs = [generator(places.seed, step, place, CROPS) for place in range(places.batch)]
    marks = [time.perf_counter()]
    pictures = [places.read_image(i, rng) for i, rng in zip(numbers, rngs, strict=True)]
    marks.append(time.perf_counter())
    for image, boxes in pictures:
        places.multi_crop(image, boxes)
    marks.append(time.perf_counter())
    batch = collate([places[step, place] for place in range(places.batch)])
    marks.append(time.perf_counter())
    for crops, rows in ((batch.global_crops, batch.global_colour), (batch.local_crops, batch.local_colour)):
        if len(crops):
            colour(crops, rows)
    marks.append(time.perf_counter())
    decode_, cut, both, coloured = (end - begun for begun, end in pairwise(marks))
    return {"decode": decode_, "cut": cut, "colour": coloured, "decode and cut": both, "all": both + coloured}


def _loader_rate(source: ImageSource, recipe: Recipe, rounds: int) -> dict[str, float]:
    """What the loader hands over when nobody takes its time: the start, s, and images per second after it."""
    begun = time.perf_counter()
    batches = iter(
        training_loader(
            source, recipe.crops, None, seed=recipe.run.seed, start_step=0, steps=rounds + 4,
            batch=recipe.optim.batch, workers=recipe.run.workers,
        )
    )  # fmt: skip
    next(batches)
    start = time.perf_counter() - begun
    begun = time.perf_counter()
    handed = sum(batch.images for batch in batches)
    return {"start_s": start, "images_per_second": handed / (time.perf_counter() - begun)}
