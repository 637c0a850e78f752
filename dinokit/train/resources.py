"""What a run needs of its machine (memory, time, disk), and what makes it need less: estimates."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dinokit.config.load import Recipe
from dinokit.data.scan import findings, scan
from dinokit.data.sources import ImageSource
from dinokit.runtime.device import peak_memory
from dinokit.runtime.distributed import world_size
from dinokit.runtime.files import printable
from dinokit.runtime.log import clock
from dinokit.train.choose import LOOKED_AT, measure
from dinokit.train.plan import GIB, activation_memory, plan, state_memory

LEAST_SAVING = 0.05  # GiB, below which a change is not worth naming
CHANGES = 3  # named at most
TRIED = 6_000  # student tokens in a step of a dry run, at most
SECONDS = 2.0  # in which images are looked at before a training
REPEATED = 0.02  # share of exact duplicates in a sample from which on they are named
SAVED = 0.8  # share of a run's memory that a checkpoint has: all but the gradients
MEMINFO = Path("/proc/meminfo")  # of Linux


def memory_needed(recipe: Recipe) -> float:
    """GiB of a process for weights, gradients, optimiser, teacher, and a backward pass: an estimate."""
    images = max(recipe.optim.batch // world_size() // recipe.run.accumulate, 1)
    return state_memory(recipe) + activation_memory(recipe, images)[1]


def planned(recipe: Recipe, device: torch.device, seconds: float) -> dict[str, Any]:
    """What a run is expected to need, for its report.

    Args:
        recipe: of the run, its precision resolved.
        device: of this process.
        seconds: of a step, measured here before; 0: not measured.
    """
    time = {"seconds_per_step": seconds} if seconds else {}
    return {"device": device.type, "memory_gib": memory_needed(recipe), **time}


def memory_available(device: torch.device) -> float:
    """GiB that are free on a device now; infinite where the system does not say.

    On Linux, the kernel's MemAvailable: files that it has cached make room where a process needs it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    if not MEMINFO.exists():  # macOS and Windows have no such number
        return float("inf")
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 2**10 / GIB


def savings(recipe: Recipe) -> list[tuple[str, float]]:
    """Changes of a recipe that need less memory, with the GiB that each saves; the largest first."""
    before = memory_needed(recipe)
    found = [(text, before - memory_needed(changed)) for text, changed in _changes(recipe)]
    found = [(text, saved) for text, saved in found if saved > LEAST_SAVING]
    return sorted(found, key=lambda change: -change[1])[:CHANGES]


def _changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    run, optim, crops = recipe.run, recipe.optim, recipe.crops
    images = optim.batch // world_size() // run.accumulate
    parts = next((parts for parts in (4, 2) if images % parts == 0 and images // parts >= 2), 0)
    if parts:
        more = run.accumulate * parts
        yield (
            f"run.accumulate={more} (the same batch in smaller parts; slower)",
            replace(recipe, run=replace(run, accumulate=more)),
        )
    if run.checkpointing != "full":
        yield (
            "run.checkpointing=full (blocks are computed twice; slower)",
            replace(recipe, run=replace(run, checkpointing="full")),
        )
    if images >= 4:
        yield (
            f"optim.batch={optim.batch // 2} (fewer images in a step: it learns otherwise)",
            replace(recipe, optim=replace(optim, batch=optim.batch // 2)),
        )
    if crops.locals.count > 1:
        fewer = crops.locals.count // 2
        yield (
            f"crops.locals.count={fewer} (it learns otherwise)",
            replace(recipe, crops=replace(crops, locals=replace(crops.locals, count=fewer))),
        )


def advice(recipe: Recipe) -> str:
    """savings() as lines for people."""
    lines = [f"  {text}: about {saved:.1f} GiB less" for text, saved in savings(recipe)]
    return "\n".join(["What helps, one at a time:", *lines]) if lines else "A smaller backbone is needed."


def warning(recipe: Recipe, source: ImageSource, device: torch.device) -> list[str]:
    """Lines about a run that does not fit: its memory, a batch larger than the data, and a sample of images.

    It takes at most SECONDS and the time to read one image. Empty if all fits.
    """
    lines, images = [], len(source)
    needed, free = memory_needed(recipe), memory_available(device)
    if needed > free:
        lines.append(
            f"This run needs about {needed:.1f} GiB of memory, and {free:.1f} GiB are free on {device.type}."
        )
        lines.append(advice(recipe))
    if recipe.optim.batch > images > 0:  # without any, the loader says so
        lines.append(
            f"optim.batch={recipe.optim.batch} is more than the {images} images: a step sees some of them "
            f"twice, and they then count as different images. Take optim.batch={max(images // 4, 1)} or less."
        )
    return lines + _about_images(recipe, source)


def _about_images(recipe: Recipe, source: ImageSource) -> list[str]:
    """What of a sample of the images would harm this training."""
    colours = recipe.crops.saturation or recipe.crops.hue or recipe.crops.gray
    result = scan(source, LOOKED_AT, SECONDS)
    repeated = len(result.exact) > REPEATED * result.read
    names = {"unreadable", "not finite", "small", "mixed"}
    names |= {"grey"} if colours else set()
    names |= {"exact duplicates"} if repeated else set()
    found = findings(result, small=recipe.crops.globals.size // 2)
    lines = [printable(each.text) for each in found if each.name in names]
    if max(result.mean, default=0) > 1 >= max(recipe.crops.mean):
        lines.append(
            f"The images have a mean of {max(result.mean):g}, and crops.mean is for numbers in [0, 1]: give "
            f"uint8, or divide by 255; or set crops.mean and crops.std for these numbers."
        )
    return lines


def out_of_memory(recipe: Recipe, device: torch.device, error: BaseException) -> str:
    """The message for a run that ran out of memory."""
    first = str(error).partition("\n")[0].partition(". Tried")[0][:200]
    return (
        f"Out of memory on {device.type}: {first or type(error).__name__}. The peak was "
        f"{peak_memory(device):.1f} GiB; the estimate for this recipe is {memory_needed(recipe):.1f} GiB. "
        f"{advice(recipe)}\nThe same command with such a change resumes from the last checkpoint, if there "
        f"is one; a change of what is learnt needs a new run.out."
    )


def dry_run(recipe: Recipe, source: ImageSource, device: torch.device) -> dict[str, str]:
    """Train a few steps on a few images, which writes nothing, and tell what the run will be, by name.

    Raises:
        ValueError: for every mistake that would stop the run before its first step.
    """
    optim, out = recipe.optim, Path(recipe.run.out)
    lines = plan(recipe)
    few = min(max(TRIED // activation_memory(recipe, 1)[0], 2), optim.batch)
    small = replace(
        recipe,
        optim=replace(optim, batch=few),
        run=replace(recipe.run, workers=0, accumulate=1),
    )
    seconds = measure(small, source) / few * optim.batch
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    written = recipe.run.keep * state_memory(recipe) * SAVED
    return {
        "images": f"{len(source):,}, each seen {optim.steps * optim.batch / max(len(source), 1):.3g} times",
        **lines,
        "time": f"about {clock(seconds * optim.steps)} (hours:minutes:seconds) on {device.type}, at "
        f"{seconds:.3g} s a step, without evaluations; from a few steps of {few} images",
        "device": f"about {memory_needed(recipe):.1f} GiB needed, {memory_available(device):.1f} GiB free",
        "disk": f"about {written:.2f} GiB for checkpoints, "
        f"{shutil.disk_usage(parent).free / GIB:.1f} GiB free in {parent}",
    }
