"""dinokit list [KIND [NAME]]: losses, backbones, sources, evaluators, recipes and commands, with a line each.

The names are those of settings: losses.NAME.weight=1, backbone.name=NAME, data.name=NAME, dinokit eval NAME,
dinokit train RECIPE, dinokit curate RECIPE. A file of your own package is named in full, as mypackage.myloss.
With a name, its keys: those of `sources tar` are set as data.split=test, train.split=test and so on.

dinokit list
dinokit list losses
dinokit list sources tar
dinokit list recipes --json
"""

import ast
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from dinokit.commands import Command, config_keys, key_line
from dinokit.config import registry

REGISTRIES = {
    "losses": "losses",
    "backbones": "models",
    "sources": "data.sources",
    "evaluators": "eval",
    "dense": "data.dense",
    "objects": "data.objects",
    "videos": "data.videos",
    "pairs": "data.pairs",
    "clips": "data.clips",
    "captions": "data.captions",
    "talks": "data.talks",
    "commands": "commands",
}
KINDS = [*REGISTRIES, "recipes"]
WIDTH = 110  # characters of a line on a terminal, however wide it is


def run(command: Command) -> dict[str, Any]:
    if command.settings:
        raise ValueError(f"dinokit list takes one of {', '.join(KINDS)}, not '{command.settings[0]}'.")
    if command.words and (kind := command.words[0]) not in KINDS:
        raise LookupError(
            f"There is no kind '{kind}'.{registry.suggest(kind, KINDS)} There is: {', '.join(KINDS)}."
        )
    if len(command.words) > 1:
        return _keys(*command.words)
    found = {kind: entries(kind) for kind in command.words or KINDS}
    width = max(len(name) for lines in found.values() for name in lines)
    columns = shutil.get_terminal_size((10_000, 24)).columns  # a pipe has no width, unless COLUMNS is set
    columns = max(min(columns, WIDTH) if sys.stdout.isatty() else columns, width + 30)
    for kind, lines in found.items():
        print(f"{kind}:")
        for name, text in lines.items():
            wrapped = textwrap.wrap(text, columns - width - 6, break_on_hyphens=False)
            print(f"    {name:<{width}}  " + f"\n{' ' * (width + 6)}".join(wrapped))
    return found


def _keys(kind: str, name: str, *more: str) -> dict[str, Any]:
    """Print the keys of one entry with their defaults and meanings."""
    if more:
        raise ValueError(f"'{more[0]}': give one kind and one name, as dinokit list sources tar.")
    if kind in ("recipes", "commands"):
        raise ValueError(f"dinokit {'show' if kind == 'recipes' else 'help'} {name} has the keys of {name}.")
    keys = dict(config_keys(registry.read_config(REGISTRIES[kind], name)))
    print("\n".join([f"keys of {name}:", *(key_line(*pair) for pair in keys.items())]))
    return {name: keys}


def entries(kind: str) -> dict[str, str]:
    """The names of one of KINDS, with a line about each; no entry is imported."""
    if kind != "recipes":
        return {name: _purpose(REGISTRIES[kind], name) for name in registry.names(REGISTRIES[kind])}
    groups = "", *(each.rstrip("_") for each in registry.KINDS)
    return {name: _comment(name) for group in groups for name in registry.recipe_names(group)}


def _purpose(kind: str, name: str) -> str:
    text = ast.get_docstring(ast.parse(registry.locate(kind, name).read_text(encoding="utf-8"))) or ""
    first = text.split("\n\n")[0].replace("\n", " ")
    return first.partition(": ")[2] if kind == "commands" else first


def _comment(recipe: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    group = recipe.partition("_")[0] if recipe.startswith(registry.KINDS) else ""
    lines = registry.find_recipe(recipe, group).read_text(encoding="utf-8").splitlines()
    start = [line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    return " ".join(start).partition(". ")[0].rstrip(".")


def words() -> Sequence[str]:
    return KINDS


def describe(words: Sequence[str]) -> str:
    return f"kinds: {', '.join(KINDS)}"
