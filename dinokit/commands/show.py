"""dinokit show [RECIPE] [key=value ...]: print a complete recipe, with model size, memory and learning rate.

Nothing is trained. Every default is filled in, and the output is a recipe itself. Without RECIPE, one is
chosen for the images in data.path and this machine, as `dinokit train` does.

nodes=N gpus=N (GPUs of a node) estimates the run on a cluster: memory of a GPU, bytes sent in a step, and,
with images_per_second=N as measured on one GPU, the expected speed. It assumes gpu_gib=80 (memory of a GPU),
gpu_gbyte=300 (GB/s inside a node) and node_gbit=400 (Gbit/s of a node's network) unless you set them.

dinokit show scenes_cpu > mine.yaml
dinokit show dinov2_vitg14 data.path=LIST nodes=12 gpus=8 images_per_second=35
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dinokit.commands import RECIPE_KEYS, Command
from dinokit.commands.train import recipe_of
from dinokit.config import registry
from dinokit.config.load import read_mapping, to_yaml, unresolved

SHORT = RECIPE_KEYS
words = registry.recipe_names
COMMANDS = {"eval": "eval EVALUATOR", "head": "train-head"}  # of kinds that have not the name of theirs
CLUSTER = {"nodes": int, "gpus": int, "images_per_second": float, "gpu_gib": float, "gpu_gbyte": float,
           "node_gbit": float}  # fmt: skip


def run(command: Command) -> dict[str, Any]:
    if command.words and command.words[0].startswith(registry.KINDS):
        return _show_other(command)
    given = [text for text in command.settings if text.partition("=")[0] in CLUSTER]
    rest = [text for text in command.settings if text not in given]
    recipe = recipe_of(replace(command, settings=rest))
    cluster = dict(_number(text) for text in given)
    from dinokit.train.plan import Cluster, plan

    lines = plan(recipe, Cluster(**cluster) if cluster else None)
    print(to_yaml(recipe, template=True))
    for key, value in lines.items():
        print(f"# {key}: {value}")
    return {"recipe": unresolved(asdict(recipe)), "plan": lines}


def _show_other(command: Command) -> dict[str, Any]:
    """Print a recipe of another command than `dinokit train`, with its comments."""
    name = command.one_word("recipe")
    kind = name.partition("_")[0]
    path, its = registry.find_recipe(name, kind), COMMANDS.get(kind, kind)
    if command.settings:
        raise ValueError(f"{command.settings[0]}: give settings to the command: dinokit {its} --help.")
    print(path.read_text(encoding="utf-8"))
    print(f"# every key with its meaning: dinokit help {its}")
    return {"recipe": read_mapping(path)}


def describe(words: Sequence[str]) -> str:
    kinds = "", *(kind.rstrip("_") for kind in registry.KINDS)
    every = [name for kind in kinds for name in registry.recipe_names(kind)]
    return f"recipes: {', '.join(every)}"


def _number(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, CLUSTER[key](value.replace("_", ""))
    except ValueError:
        raise ValueError(f"{text}: {key} is a number, such as {key}=8.") from None
