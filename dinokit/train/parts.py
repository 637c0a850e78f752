"""How many parts a step is cut into, so that any number of processes keeps the recipe's batch."""

from collections.abc import Mapping
from typing import Any

from dinokit.config import registry
from dinokit.config.load import Recipe

FULL = 0.9  # of a GPU's memory: more than this is not planned for


def parts_of_step(recipe: Recipe, world: int, before: Mapping[str, Any] | None = None) -> int:
    """`run.accumulate`, or the next number of parts above it that suits this number of processes.

    Args:
        recipe: its optim.batch is images over all processes.
        world: processes.
        before: of the checkpoint that the run goes on from, `images_at_once` and the `memory_share` that it
            took of a GPU. With fewer processes each has more images; if these would not fit, parts get more.

    Raises:
        ValueError: if the batch cannot be shared out, or too few images are left in a part for some loss.
    """
    batch, wanted = recipe.optim.batch, recipe.run.accumulate
    if batch % world:
        able = [n for n in range(1, batch + 1) if batch % n == 0]
        fewer, more = max(n for n in able if n <= world), -(-batch // world) * world
        raise ValueError(
            f"optim.batch={batch} images cannot be shared out evenly over {world} processes. Start {fewer}, "
            f"or for another run take optim.batch={more}."
        )
    own = batch // world
    most = float(own)
    if before and before.get("memory_share"):
        most = before["images_at_once"] * max(FULL / before["memory_share"], 1.0)
    name, least = _most_demanding(recipe)
    able = [n for n in range(1, own + 1) if own % n == 0 and own // n >= least]
    if not able:
        raise ValueError(
            f"losses.{name} compares {least} images of one process, but optim.batch={batch} over {world} "
            f"processes gives each {own}. Start fewer processes, or drop the loss with losses.{name}=null."
            + (" Or let it compare those of all: losses.koleo.distributed=true." if name == "koleo" else "")
        )
    return next((n for n in able if n >= wanted and own // n <= most), able[-1])


def _most_demanding(recipe: Recipe) -> tuple[str, int]:
    """The loss that needs most images at a time, and how many."""
    need = {
        name: 1
        if section.get("distributed")
        else getattr(registry.read_config("losses", name), "least_images", 1)
        for name, section in recipe.losses.items()
    }
    name = max(need, key=lambda key: need[key])
    return name, need[name]
