"""What is common to commands that train on a frozen backbone: heads, alignments, models that answer."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dinokit import evaluation
from dinokit.commands import Command, config_lines
from dinokit.config import registry
from dinokit.config.load import (
    checked_values,
    merge_settings,
    parse_overrides,
    read_mapping,
    section_values,
)

SHORT_KEYS = {"weights": "backbone.weights", "out": "run.out", "device": "run.device", "seed": "run.seed"}


def check_recipe(command: Command, kind: str, config: type[Any], data: str, what: str) -> Any:
    """The checked settings of a command, with a folder for its run.

    Args:
        command: whose only word is a recipe's name or path.
        kind: the first word of such recipes in configs/.
        config: the dataclass of the recipe.
        data: its section that must be given, with the name of a registry in its metadata.
        what: that section is, for the error.

    Raises:
        ValueError, LookupError: for an unknown recipe or key, a wrong value, neither weights nor backbone, or
            no data.
    """
    path = registry.find_recipe(command.one_word("recipe", registry.recipe_names(kind)), kind=kind)
    values = merge_settings(read_mapping(path, holds=config), parse_overrides(command.settings))
    values.setdefault("name", path.stem)
    cfg = config(**checked_values(config, values))
    backbone = _backbone_section(cfg.backbone)
    if getattr(cfg, data) is None:
        kinds = {item.name: item.metadata.get("registry", "") for item in fields(config)}
        have = ", ".join(registry.names(kinds[data]))
        raise ValueError(f"{data}.name must be given, {what}; there is: {have}.")
    out = cfg.run.out or f"runs/{Path(cfg.name).name}"
    return replace(cfg, backbone=backbone, run=replace(cfg.run, out=out))


def _backbone_section(section: dict[str, Any]) -> dict[str, Any]:
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


def describe_recipe(kind: str, config: type[Any]) -> list[str]:
    """Lines of --help: the recipes in configs/ and the keys of one."""
    return [f"recipes: {', '.join(registry.recipe_names(kind))}", "keys:", *config_lines(config)]


def load_backbone(cfg: Any, device: str) -> Any:
    """The backbone of a recipe, on a device. Raises as evaluation.load_evaluated()."""
    section = {key: value for key, value in cfg.backbone.items() if key != "weights"}
    return evaluation.load_evaluated(cfg.backbone.get("weights"), section or None, device)


def open_source(kind: str, section: dict[str, Any], channels: int) -> Any:
    """The source of a section of the registry `kind`, in the channels of the backbone."""
    asked = {"channels": channels} if "channels" in section else {}
    return registry.build(kind, {**section, **asked})


def last_record(out: Path) -> dict[str, Any]:
    """What was recorded last of a run's steps; {} without any."""
    from dinokit.runtime.log import read_records

    records = [record for record in read_records(out) if "loss" in record]
    return records[-1] if records else {}
