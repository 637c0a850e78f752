"""Checks the settings of a recipe: ranges of numbers, and settings that contradict each other."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import inf
from typing import Any

from dinokit.config import registry
from dinokit.config.recipe import GramTeacher, Recipe

# Smallest and largest value of each number, or of each number in a tuple. `*` is any section.
RANGES: dict[str, tuple[float, float]] = {
    "heads.*.prototypes": (1, inf),
    "heads.*.hidden": (1, inf),
    "heads.*.bottleneck": (1, inf),
    "heads.*.layers": (1, inf),
    "heads.*.output": (1, inf),
    "losses.*.weight": (0, inf),
    "losses.*.local_weight": (0, inf),
    "losses.*.ramp": (0, inf),
    "teacher.momentum": (0, 1),
    "teacher.temp": (1e-3, inf),
    "teacher.temp_warmup": (0, inf),
    "teacher.temp_every": (1, inf),
    "teacher.gram.refresh_from": (0, inf),
    "teacher.gram.refresh_every": (0, inf),
    "teacher.gram.refreshes": (1, inf),
    "crops.*.count": (0, inf),
    "crops.*.size": (1, inf),
    "crops.*.scale": (0, 1),
    "crops.*.blur": (0, 1),
    "crops.*.solarize": (0, 1),
    "crops.ratio": (0.01, inf),
    "crops.gram_size": (0, inf),
    "crops.flip": (0, 1),
    "crops.vertical_flip": (0, 1),
    "crops.transpose": (0, 1),
    "crops.jitter": (0, 1),
    "crops.brightness": (0, inf),
    "crops.contrast": (0, inf),
    "crops.saturation": (0, inf),
    "crops.hue": (0, 0.5),
    "crops.tint": (0, 1),
    "crops.gray": (0, 1),
    "crops.blur_sigma": (0.01, inf),
    "crops.blur_kernel": (1, inf),
    "crops.solarize_threshold": (0, 1),
    "crops.mean": (-inf, inf),
    "crops.std": (1e-6, inf),
    "masks.images": (0, 1),
    "masks.patches": (0, 1),
    "optim.steps": (1, inf),
    "optim.batch": (1, inf),
    "optim.lr": (0, inf),
    "optim.lr_batch": (1, inf),
    "optim.head_warmup": (0, inf),
    "optim.warmup": (0, inf),
    "optim.min_lr": (0, inf),
    "optim.weight_decay": (0, inf),
    "optim.betas": (0, 1),
    "optim.clip": (0, inf),
    "optim.layer_decay": (0, 1),
    "optim.patch_lr": (0, inf),
    "optim.head_frozen": (0, inf),
    "run.seed": (0, inf),
    "run.accumulate": (1, inf),
    "run.workers": (-1, inf),
    "run.log_every": (1, inf),
    "run.checkpoint_every": (1, inf),
    "run.keep": (1, inf),
    "run.keep_every": (0, inf),
    "run.timeout_minutes": (0.05, inf),
    "run.max_unreadable": (0, 1),
    "run.max_skipped": (0, inf),
}


USES = {"heads", "masks", "projection", "gram"}  # what a loss may declare that it reads


def check(recipe: Recipe) -> None:
    """Check all settings of a recipe.

    Raises:
        ValueError: for a number out of its range, or settings that contradict each other; it names the keys
            and says how to correct them.
    """
    _check_ranges(recipe)
    _check_losses(recipe)
    _check_crops(recipe)
    _check_steps(recipe)


def range_of(key: str) -> tuple[float, float] | None:
    """The range in RANGES of a key such as 'crops.globals.size'; None if there is none."""
    names = key.split(".")  # a loss of another package has dots in its name
    return RANGES.get(key) or (RANGES.get(f"{names[0]}.*.{names[-1]}") if len(names) > 2 else None)


def settings_of(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a dataclass with its value, of dataclasses inside it and of losses: ('optim.lr', 4e-3)."""
    for item in fields(section):
        value = getattr(section, item.name)
        if item.name == "losses":
            for name, values in value.items():
                yield from ((f"losses.{name}.{key}", each) for key, each in values.items())
        elif is_dataclass(value):
            yield from settings_of(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _check_ranges(recipe: Recipe) -> None:
    for key, value in settings_of(recipe):
        low, high = range_of(key) or (-inf, inf)
        numbers = value if isinstance(value, tuple | list) else (value,)
        if range_of(key) and any(not low <= number <= high or number == inf for number in numbers):
            allowed = (
                f"{low:g} or more{', and finite' * (inf in numbers)}"
                if high == inf
                else f"from {low:g} to {high:g}"
            )
            raise ValueError(f"{key}={value}: it must be {allowed}.")


def _check_crops(recipe: Recipe) -> None:
    crops = recipe.crops
    if not crops.globals.count:
        raise ValueError("crops.globals.count=0: teacher and student must see at least one global crop.")
    if crops.globals.count + crops.locals.count < 2:
        raise ValueError(
            "crops: with one global crop and no local crop there is nothing to compare; add crops."
        )
    for i, (share, large, small, gram) in enumerate(crops.mixed):
        if share <= 0 or min(large, small) < 1 or gram < 0 or bool(gram) != bool(crops.gram_size):
            raise ValueError(
                f"crops.mixed[{i}]=[{share:g}, {large}, {small}, {gram}]: give a probability above 0, pixels "
                "of global, of local and of the Gram teacher's crops; the last is 0 where crops.gram_size is."
            )
    ordered = ("crops.globals.scale", "crops.locals.scale", "crops.ratio", "crops.blur_sigma")
    for key, value in settings_of(recipe):
        if key in ordered and value[0] > value[1]:
            raise ValueError(f"{key}=[{value[0]:g}, {value[1]:g}]: the smaller number comes first.")
    for name, group in {"globals": crops.globals, "locals": crops.locals}.items():
        for key in ("blur", "solarize"):
            given = len(getattr(group, key))
            if given not in (1, group.count) and group.count:
                raise ValueError(
                    f"crops.{name}.{key} gives {given} probabilities for "
                    f"crops.{name}.count={group.count} crops: give one for all, or one for each crop."
                )
    if len(crops.mean) != len(crops.std):
        raise ValueError(f"crops.mean has {len(crops.mean)} channels, crops.std has {len(crops.std)}.")
    if crops.blur_kernel % 2 == 0:
        raise ValueError(f"crops.blur_kernel={crops.blur_kernel} must be odd.")


def _check_steps(recipe: Recipe) -> None:
    optim, teacher, run = recipe.optim, recipe.teacher, recipe.run
    if optim.head_warmup + optim.warmup >= optim.steps:
        both = f"optim.head_warmup={optim.head_warmup} and " if optim.head_warmup else ""
        tenth = optim.steps // 10
        raise ValueError(
            f"{both}optim.warmup={optim.warmup} {'leave' if both else 'leaves'} nothing of "
            f"optim.steps={optim.steps}. For a short run set a short warm-up, such as optim.warmup={tenth}"
            f"{f' optim.head_warmup={tenth}' if both else ''}; or set more steps."
        )
    if optim.batch % run.accumulate:
        raise ValueError(
            f"optim.batch={optim.batch} cannot be divided into run.accumulate={run.accumulate} equal "
            f"micro-batches."
        )
    if 0 < teacher.temp_warmup < teacher.temp_every:
        raise ValueError(
            f"teacher.temp_warmup={teacher.temp_warmup} is less than "
            f"teacher.temp_every={teacher.temp_every} steps: set teacher.temp_every to "
            f"{teacher.temp_warmup} or less, or teacher.temp_warmup=0 for no warm-up."
        )
    if run.keep_every % run.checkpoint_every:
        raise ValueError(
            f"run.keep_every={run.keep_every} is not a multiple of "
            f"run.checkpoint_every={run.checkpoint_every}, so most of these steps would have no checkpoint."
        )


def _check_gram(recipe: Recipe) -> None:
    """Check losses.gram, teacher.gram and crops.gram_size against each other, before the first step."""
    given = recipe.teacher.gram
    readers = [n for n in recipe.losses if "gram" in getattr(registry.read_config("losses", n), "uses", ())]
    if readers and given is None:
        raise ValueError(
            f"losses.{readers[0]} needs a Gram teacher: teacher.gram.weights=RUN_OR_FILE, or "
            "teacher.gram={} for the moving average itself."
        )
    if given is not None and not readers:
        raise ValueError("`teacher.gram` is given, but no loss reads it; remove it with teacher.gram=null.")
    if recipe.crops.gram_size and (given is None or not given.weights):
        raise ValueError(
            f"crops.gram_size={recipe.crops.gram_size} is for a Gram teacher with weights of its own: give "
            "teacher.gram.weights=RUN_OR_FILE, or crops.gram_size=0."
        )
    if given is not None and given.refresh_every and not given.weights:
        raise ValueError(
            "teacher.gram.refresh_every copies the moving average, and without teacher.gram.weights the Gram "
            "teacher is the moving average: set teacher.gram.refresh_every=0."
        )
    if given is not None and not given.refresh_every:
        for key in ("refresh_from", "refreshes"):
            if getattr(given, key) != getattr(GramTeacher, key):
                raise ValueError(
                    f"teacher.gram.{key} has no effect without teacher.gram.refresh_every, which needs "
                    f"teacher.gram.weights: give these, or leave {key} out."
                )
    if given is not None and given.refresh_every and not given.refresh_from:
        raise ValueError(
            "teacher.gram.refresh_from=0 would replace teacher.gram.weights before a step has used them: "
            "give the number of steps before the first copy, or teacher.gram.refresh_every=0."
        )
    if recipe.teacher.start and (recipe.backbone.get("weights") or recipe.teacher.frozen):
        raise ValueError(
            "teacher.start takes backbone and heads from a run, so it does not go with backbone.weights or "
            "teacher.frozen: give one of them."
        )
    if given is not None and recipe.teacher.frozen:
        raise ValueError("teacher.gram anchors to an earlier self: it does not go with teacher.frozen.")


def _check_losses(recipe: Recipe) -> None:
    if not recipe.losses:
        available = ", ".join(registry.names("losses"))
        raise ValueError(f"losses is empty, so there is nothing to learn from. There is: {available}.")
    configs = {name: registry.read_config("losses", name) for name in recipe.losses}
    for name, values in recipe.losses.items():
        if "weight" not in values:
            raise ValueError(
                f"losses.{name}: its Config needs the field `weight: float = 1.0`, its factor in the sum."
            )
        if not isinstance(weight := values["weight"], int | float):
            raise ValueError(
                f"losses.{name}.weight={weight}: it is one number over the whole run, its factor in the sum. "
                f"losses.{name}.phase=[START, END] is the part of the run in which the loss counts."
            )
    for name, cls in configs.items():
        if unknown := sorted(set(getattr(cls, "uses", ())) - USES):
            raise ValueError(
                f"losses.{name}: `uses` has {unknown[0]!r}, and it may have {', '.join(sorted(USES))}."
            )
    masked = [name for name, cls in configs.items() if "masks" in getattr(cls, "uses", ())]
    _check_masks(recipe, masked)
    _check_gram(recipe)
    _check_phases(recipe)
    projected = [name for name, cls in configs.items() if "projection" in getattr(cls, "uses", ())]
    if projected and recipe.heads.projector is None:
        raise ValueError(
            f"losses.{projected[0]} compares projections, but there is no section `heads.projector`: add it, "
            f"such as heads.projector.output=128."
        )
    if recipe.heads.projector is not None and not projected:
        raise ValueError(
            "`heads.projector` is given, but no loss of this recipe uses it; remove it with "
            "heads.projector=null."
        )
    micro_batch = recipe.optim.batch // recipe.run.accumulate
    for name, cls in configs.items():
        least = getattr(cls, "least_images", 1)
        if micro_batch < least:
            raise ValueError(
                f"losses.{name} needs {least} images at a time, but optim.batch={recipe.optim.batch} in "
                f"run.accumulate={recipe.run.accumulate} micro-batches gives {micro_batch}. Raise "
                f"optim.batch, or remove the loss with losses.{name}=null."
            )


def _check_phases(recipe: Recipe) -> None:
    """Check that phases are shares of the run, and that at every step some loss counts."""
    phases = {name: tuple(values.get("phase", (0.0, 1.0))) for name, values in recipe.losses.items()}
    for name, (start, end) in phases.items():
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"losses.{name}.phase=[{start:g}, {end:g}]: give two shares of the run, the smaller first, "
                f"such as [0, 0.6] for the first 60 % of the steps."
            )
    ends = sorted({0.0, *(share for phase in phases.values() for share in phase)} - {1.0})
    for share in ends:
        if not any(start <= share < end for start, end in phases.values()):
            raise ValueError(
                f"At {share:.0%} of the run no loss counts: the phases are "
                f"{', '.join(f'losses.{name}.phase=[{a:g}, {b:g}]' for name, (a, b) in phases.items())}."
            )


def _check_masks(recipe: Recipe, masked: list[str]) -> None:
    """Check the masks against the losses that read masked patches."""
    if recipe.teacher.frozen and recipe.masks is not None:  # as DINOv2 distils (arXiv 2304.07193, section 5)
        raise ValueError(
            "teacher.frozen is given, and with a frozen teacher nothing is masked: the student learns all "
            "patches of global crops. Remove the section with masks=null."
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
                f"`{key}` is given, but no loss of this recipe uses it; remove it with {key}=null."
            )
