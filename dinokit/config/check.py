"""Which settings of a recipe cannot stand together."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from dinokit.config import registry
from dinokit.config.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Hold a recipe's settings against each other.

    Raises:
        ValueError: naming the keys of those that cannot stand together, and the way out.
    """
    for key, value, (low, high) in _ranges(recipe, ""):
        numbers = value if isinstance(value, tuple) else (value,)
        if any(not low <= number <= high for number in numbers):
            wanted = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
            raise ValueError(f"{key}={value}: it must be {wanted}.")
    _check_losses(recipe)
    optim, crops, run = recipe.optim, recipe.crops, recipe.run
    if not crops.globals.count:
        raise ValueError("crops.globals.count=0: teacher and student must see at least one global crop.")
    if crops.globals.count + crops.locals.count < 2:
        raise ValueError("crops: one global crop and no local one leave nothing to compare; add crops.")
    if optim.head_warmup + optim.warmup >= optim.steps:
        both = f"optim.head_warmup={optim.head_warmup} and " if optim.head_warmup else ""
        tenth = optim.steps // 10
        raise ValueError(
            f"{both}optim.warmup={optim.warmup} {'leave' if both else 'leaves'} nothing of "
            f"optim.steps={optim.steps}. A shorter run needs a shorter start: optim.warmup={tenth}"
            f"{f' optim.head_warmup={tenth}' if both else ''}, say; or take more steps."
        )
    if optim.batch % run.accumulate:
        raise ValueError(
            f"optim.batch={optim.batch} cannot be cut into run.accumulate={run.accumulate} equal parts."
        )
    pairs = {
        "crops.globals.scale": crops.globals.scale,
        "crops.locals.scale": crops.locals.scale,
        "crops.ratio": crops.ratio,
        "crops.blur_sigma": crops.blur_sigma,
    }
    for name, (low, high) in pairs.items():
        if low > high:
            raise ValueError(f"{name}=[{low:g}, {high:g}]: the smaller number comes first.")
    for name, group in {"globals": crops.globals, "locals": crops.locals}.items():
        for key in ("blur", "solarize"):
            given = getattr(group, key)
            if len(given) not in (1, group.count) and group.count:
                raise ValueError(
                    f"crops.{name}.{key} gives {len(given)} probabilities for "
                    f"crops.{name}.count={group.count} crops: give one for all, or one a crop."
                )
    if len(crops.mean) != len(crops.std):
        raise ValueError(f"crops.mean has {len(crops.mean)} channels, crops.std has {len(crops.std)}.")
    if crops.blur_kernel % 2 == 0:
        raise ValueError(f"crops.blur_kernel={crops.blur_kernel} must be odd.")
    _check_steps(recipe)


def _check_steps(recipe: Recipe) -> None:
    teacher, run = recipe.teacher, recipe.run
    if 0 < teacher.temp_warmup < teacher.temp_every:
        raise ValueError(
            f"teacher.temp_warmup={teacher.temp_warmup} is less than one stair of "
            f"teacher.temp_every={teacher.temp_every} steps: set teacher.temp_every to "
            f"{teacher.temp_warmup} or less, or teacher.temp_warmup=0 for no warm-up."
        )
    if run.keep_every % run.checkpoint_every:
        raise ValueError(
            f"run.keep_every={run.keep_every} is no multiple of run.checkpoint_every={run.checkpoint_every}, "
            f"so there is no checkpoint at most of these steps to keep."
        )


def _ranges(section: Any, where: str) -> Iterator[tuple[str, Any, tuple[float, float]]]:
    """Key, value and range of every field that has one."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _ranges(value, f"{where}{item.name}.")
        elif "range" in item.metadata:
            yield f"{where}{item.name}", value, item.metadata["range"]


def _check_losses(recipe: Recipe) -> None:
    if not recipe.losses:
        there = ", ".join(registry.names("losses"))
        raise ValueError(f"losses is empty, so there is nothing to learn from. There is: {there}.")
    configs = {name: registry.read_config("losses", name) for name in recipe.losses}
    masked = [name for name, cls in configs.items() if "masks" in getattr(cls, "uses", ())]
    if recipe.teacher.frozen and recipe.masks is not None:  # as DINOv2 distils (arXiv 2304.07193, section 5)
        raise ValueError(
            "teacher.frozen is given, and under a frozen teacher nothing is masked: all patches of global "
            "crops are learnt from. Take the section out with masks=null."
        )
    if not recipe.teacher.frozen and masked and recipe.masks is None:
        raise ValueError(f"losses.{masked[0]} learns from masked patches, but there is no section `masks`.")
    crops = recipe.crops.globals.count * recipe.optim.batch
    if masked and recipe.masks is not None and crops * recipe.masks.images < 1 <= crops:
        raise ValueError(
            f"masks.images={recipe.masks.images:g} of {crops} global crops in a step is none, so "
            f"losses.{masked[0]} would learn nothing. Raise masks.images or optim.batch."
        )
    for key, value in {"masks": recipe.masks, "heads.patch": recipe.heads.patch}.items():
        if value is not None and not masked:
            raise ValueError(
                f"`{key}` is given, but no loss of this recipe reads it; take it out with {key}=null."
            )
    part = recipe.optim.batch // recipe.run.accumulate
    for name, cls in configs.items():
        least = getattr(cls, "least_images", 1)
        if part < least:
            raise ValueError(
                f"losses.{name} needs {least} images at a time, but optim.batch={recipe.optim.batch} in "
                f"run.accumulate={recipe.run.accumulate} parts gives {part}. Raise optim.batch, or drop it "
                f"with losses.{name}=null."
            )
