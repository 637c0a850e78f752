"""Recipes of what is trained on a frozen backbone: the heads, alignments and models of their commands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dinokit.commands import Command
from dinokit.config import registry
from dinokit.config.load import merge_settings, parse_overrides, read_mapping, section_values


def read_recipe(path: Path, room: str, module: str, config: type[Any]) -> Any:
    """The settings in a recipe's file, as `config`, which is dinokit.ROOM.MODULE.Config.

    Raises:
        ValueError, LookupError: for an unknown key, a wrong value or name; it names the key.
    """
    return config(**section_values(room, module, read_mapping(path, holds=config), ""))


def check_recipe(command: Command, kind: str, room: str, module: str, config: type[Any]) -> Any:
    """The checked settings of a command, with a folder for its run.

    Args:
        command: whose only word is a recipe's name or path.
        kind: the first word of such recipes in configs/.
        room: of the recipe's dataclass.
        module: of the recipe's dataclass.
        config: the dataclass.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, or neither weights nor backbone.
    """
    path = registry.find_recipe(command.one_word("recipe", registry.recipe_names(kind)), kind=kind)
    values = merge_settings(read_mapping(path, holds=config), parse_overrides(command.settings))
    values.setdefault("name", path.stem)
    cfg = config(**section_values(room, module, values, ""))
    out = cfg.run.out or f"runs/{Path(cfg.name).name}"
    return replace(cfg, backbone=backbone_section(cfg.backbone), run=replace(cfg.run, out=out))


def backbone_section(section: dict[str, Any]) -> dict[str, Any]:
    """The checked section `backbone`: weights alone, or a name with its keys.

    Raises:
        ValueError, LookupError: if both or neither are given, or a key is wrong.
    """
    if bool(section.get("weights")) == ("name" in section):
        raise ValueError(
            "Give either weights=FILE_OR_RUN or backbone.name=NAME (as its own code makes it), and not both."
        )
    if not section.get("weights"):
        rest = {key: value for key, value in section.items() if key not in ("name", "weights")}
        return {"name": section["name"], **section_values("models", section["name"], rest, "backbone")}
    if len(section) > 1:
        more = ", ".join(f"backbone.{key}" for key in section if key != "weights")
        raise ValueError(f"{more}: the backbone is the one of weights={section['weights']}; remove it.")
    return section
