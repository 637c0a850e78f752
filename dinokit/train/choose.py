"""Chooses a recipe and its settings for images and a machine: `dinokit train data.path=PHOTOS`.

The choices are overrides of a recipe in configs/, each with a reason for people. What the user gives comes
after them and so wins.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe
from dinokit.config.values import source_of
from dinokit.data.loader import MAX_WORKERS
from dinokit.data.scan import scan
from dinokit.data.sources import ImageSource
from dinokit.runtime.device import pick_device
from dinokit.runtime.distributed import cpu_cores
from dinokit.train.run_dir import with_precision
from dinokit.train.step import Step

LOOKED_AT = 200  # images that are read, here and at the start of a training
MINUTES = {"laptop": 60.0, "small_photos": 120.0}  # of a run, if the user does not say
WARM_STEPS, TIMED_STEPS = 2, 4  # of the measurement: the first steps allocate memory
EVALUATIONS = 5  # in a run
AVERAGED = 0.02  # of a run that the teacher averages over: one that averages over more lags behind
LEAST_STD = 0.01  # crops are divided by it, and images of one colour have none
LEAST_STEPS = 50
TRAINING_SHARE = 0.9  # of the minutes; the rest is for evaluations and the end of the run


@dataclass
class Choice:
    """A recipe, overrides with the reason for each, and facts about the images."""

    recipe: str
    overrides: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of a step, measured; 0: not measured

    def set(self, key: str, value: object, reason: str) -> None:
        """Add an override."""
        self.overrides[key], self.reasons[key] = _as_yaml(value), reason

    def settings(self) -> list[str]:
        """key=value, for load_recipe()."""
        return [f"{key}={value}" for key, value in self.overrides.items()]

    def lines(self, given: Mapping[str, str]) -> list[str]:
        """For people: facts, the recipe, and each choice that the user did not make."""
        chosen = [
            f"  {key}={value}  ({self.reasons[key]})"
            for key, value in self.overrides.items()
            if key not in given
        ]
        return [*self.facts, f"recipe {self.recipe}, with:", *chosen]


def choose(
    settings: Sequence[str], device: str, given: ImageSource | None = None
) -> tuple[Choice, ImageSource]:
    """Look at the images and the device, and choose everything but the number of steps.

    Args:
        settings: key=value as given, with data.path; without data.name the kind follows from the path.
        device: `run.device`.
        given: the images, in place of those that the settings name.

    Raises:
        ValueError: if there are too few images, or none can be read.
    """
    kind = pick_device(device).type
    choice = Choice("small_photos" if kind == "cuda" else "laptop")
    of_data = [text for text in settings if text.startswith(("data.", "backbone.channels="))]
    if given is None:
        path = dict(text.partition("=")[::2] for text in of_data)["data.path"]
        choice.set("data.name", source_of(path), "by the path")

    def opened() -> ImageSource:
        if given is not None:
            return given
        recipe = load_recipe(choice.recipe, [*choice.settings(), *of_data])
        source: ImageSource = registry.build("data.sources", recipe.data)
        return source

    source = opened()
    if given is None and source.classes and not any(text.startswith("data.split=") for text in of_data):
        choice.set("data.split", "train", "the images have labels: the test images are for evaluation alone")
        source = opened()
    found = scan(source, LOOKED_AT)
    if not found.sizes:
        raise ValueError(f"None of {found.read} images of a sample can be read: {found.unreadable[0]}")
    sides = [min(size) for size in found.sizes]
    side = int(np.median(sides))
    choice.facts.append(
        f"{len(source):,} images, shorter side {min(sides)} to {max(sides)} pixels, {kind} with "
        f"{os.cpu_count()} cores"
    )
    if choice.recipe == "laptop":
        choice.set(
            "backbone.stem", "conv",
            "learns more from few images, and is exported to ONNX alone; linear is exported everywhere",
        )  # fmt: skip
    if not hasattr(source, "stored"):
        choice.set("crops.decode", "whole", "the images are no files that could be decoded at a smaller size")
    _choose_size(choice, side)
    _choose_batch(choice, len(source))
    choice.set("crops.mean", found.mean, "of these images")
    choice.set("crops.std", [max(value, LEAST_STD) for value in found.std], "of these images")
    channels, grey = len(found.mean), found.grey == len(sides)
    if grey or channels != 3:
        reason = f"they are for red, green and blue, not {channels} channels"
        if grey or channels == 1:
            reason = "the images have no colour"
        for key in ("saturation", "hue", "gray"):
            choice.set(f"crops.{key}", 0.0, reason)
    return choice, source


def measure(recipe: Recipe, source: ImageSource) -> float:
    """Mean seconds of a training step with this recipe here, loading included. Nothing is written."""
    device = pick_device(recipe.run.device)
    recipe = with_precision(recipe, device)
    random_state = torch.random.get_rng_state()
    step = Step(recipe, device)
    phases = (values.get("phase", (0.0, 1.0)) for values in recipe.losses.values())
    shares = sorted({0.0, 1.0, *(share for phase in phases for share in phase)})
    seconds = 0.0
    for start, end in pairwise(shares):  # other losses count in each of them
        seconds += (end - start) * _time_steps(step, source, int(start * recipe.optim.steps + 0.5))
    torch.random.set_rng_state(random_state)
    return seconds


def _time_steps(step: Step, source: ImageSource, start: int) -> float:
    """Seconds of a step, from a few steps that begin at `start`, loading included.

    Loader processes have batches ready when the clock starts; so many steps more are timed.
    """
    recipe = step.recipe
    workers = recipe.run.workers if recipe.run.workers >= 0 else min(MAX_WORKERS, cpu_cores() - 1)
    timed = TIMED_STEPS + 2 * workers
    loader = step.loader(source, start, start + WARM_STEPS + timed)
    begin = 0.0
    for number, batch in enumerate(loader):
        if number == WARM_STEPS:
            begin = _now(step.device)
        step(batch)
    return (_now(step.device) - begin) / timed


def with_steps(choice: Choice, source: ImageSource, given: list[str], minutes: float = 0.0) -> None:
    """Choose the number of steps, and what depends on it, from the speed measured here."""
    # The warm-up follows from the steps below; until then it must not be longer than the run.
    recipe = load_recipe(choice.recipe, [*choice.settings(), "optim.warmup=0", *given])
    steps = recipe.optim.steps
    if not any(text.startswith("optim.steps=") for text in given):
        minutes = minutes or MINUTES[choice.recipe]
        choice.seconds = seconds = measure(recipe, source)
        steps = max(round(TRAINING_SHARE * 60 * minutes / seconds), LEAST_STEPS)
        epochs = steps * recipe.optim.batch / len(source)
        reason = f"{minutes:g} min at {seconds:.3g} s a step; each image {epochs:.0f} times"
        if steps == LEAST_STEPS:
            needed = steps * seconds / TRAINING_SHARE / 60
            reason += f"; {LEAST_STEPS} steps are the least, about {needed:.2g} min"
        choice.set("optim.steps", steps, reason)
    choice.set("optim.warmup", min(max(steps // 20, 1), 200), "a twentieth of the steps, at most 200")
    momentum = round(1 - 1 / max(AVERAGED * steps, 2), 4)
    choice.set(
        "teacher.momentum", [momentum, momentum], f"the teacher averages over {AVERAGED:.0%} of the run"
    )
    every = max(steps // EVALUATIONS, 1)
    if "knn" in recipe.evals:
        choice.set("evals.knn.every", every, f"{EVALUATIONS} times in the run, if there are labels")
    choice.set("run.checkpoint_every", max(min(500, every), 1), "so that a stopped run loses little")
    if choice.recipe == "small_photos":
        choice.set("teacher.temp_warmup", steps // 7, "as in the recipe, a seventh of the steps")
        choice.set("optim.head_frozen", steps // 100, "as in the recipe, a hundredth of the steps")


def _choose_size(choice: Choice, side: int) -> None:
    """Crop sizes and patch for images of a median shorter side."""
    if side <= 48:
        size, patch, why = 32, 4, f"the images have {side} pixels"
    elif side <= 96:
        size, patch, why = 64, 8, f"the images have {side} pixels"
    elif choice.recipe == "laptop":
        size, patch, why = 64, 8, "few patches, for a laptop"
    elif side <= 192:
        size, patch, why = 128, 16, f"the images have {side} pixels"
    else:
        return  # the recipe's 224 pixels
    choice.set("backbone.size", size, why)
    choice.set("backbone.patch", patch, f"{(size // patch) ** 2} patches a large crop")
    choice.set("crops.globals.size", size, "as backbone.size")
    choice.set("crops.locals.size", size // 2, "half of it")
    choice.set("evals.knn.resize", size, "as the crops")
    if size <= 64:
        for group in ("globals", "locals"):
            choice.set(f"crops.{group}.blur", [0.0], f"nothing to blur at {size} pixels")


def _choose_batch(choice: Choice, images: int) -> None:
    """A batch that the images fill."""
    batch = usual = load_recipe(choice.recipe, ["data.path=."]).optim.batch
    if images < 16:
        raise ValueError(
            f"There are {images} images: a network learns from hundreds at least, better thousands. Give "
            f"data.path a folder with more, or take a released backbone (dinokit models)."
        )
    while batch > images // 4 and batch > 8:
        batch //= 2
    if batch != usual:
        choice.set("optim.batch", batch, f"for {images} images")


def _as_yaml(value: object) -> str:
    return str(value).replace(" ", "")


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
