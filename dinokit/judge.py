"""Judging a backbone on labelled images: what is judged, on which data, by which evaluator.

Settings are checked without torch, as in dinokit.config, so a mistake is answered at once; the imports that
need it wait until there is a backbone to load.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dinokit import shelves
from dinokit.config import data_section, section_values

if TYPE_CHECKING:
    from dinokit.backbones import Backbone


def source_fields(name: str) -> dict[str, str]:
    """The fields of an evaluator's Config that are sources, with the split that each stands for."""
    config = shelves.read_config("eval", name)
    return {f.name: f.metadata["split"] for f in fields(config) if "split" in f.metadata}


def needs_labels(name: str) -> bool:
    """Whether an evaluator asks for labelled images."""
    config = shelves.read_config("eval", name)
    return any(f.metadata.get("labels", True) for f in fields(config) if "split" in f.metadata)


def with_start(name: str, values: Mapping[str, Any], start: str) -> dict[str, Any]:
    """`values` of an evaluator, with the weights that a run began with where it compares with them."""
    config = shelves.read_config("eval", name)
    keys = [f.name for f in fields(config) if "start" in f.metadata and not values[f.name]]
    return {**values, **dict.fromkeys(keys, start)}


def with_data(name: str, values: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """`values` of an evaluator, each source that is not given filled in from a run's section `data`.

    Raises:
        ValueError: if one is not given, and there is no data with splits to take it from.
    """
    done = dict(values)
    for key, split in source_fields(name).items():
        if done[key] is None:
            if data is None or "split" not in data:
                raise ValueError(
                    f"{key}.path (a folder with one sub-folder a class) or {key}.name must be given."
                )
            done[key] = {**data, "split": split}
    return done


def trained_on(weights: str) -> dict[str, Any] | None:
    """The section `data` of the recipe that trained a file's weights, or None if the file does not say.

    Raises:
        ValueError, LookupError: if there are no such weights, or their source is not to be had here.
    """
    from dinokit.weights import describe

    recipe = describe(weights)["recipe"]
    return data_section(recipe) if recipe else None


def architecture(weights: str) -> dict[str, Any]:
    """The section `backbone` that a file's or a run's weights are of.

    Raises:
        ValueError, LookupError: if there are no such weights.
    """
    from dinokit.weights import describe

    return dict(describe(weights)["backbone"])


def load_judged(weights: str | None, untrained: Mapping[str, Any] | None, device: str) -> "Backbone":
    """The backbone to judge.

    Args:
        weights: a file or a run; or None, and then:
        untrained: the section `backbone` of one without training, drawn from seed 0.
        device: as run.device.

    Raises:
        ValueError, LookupError: if there are no such weights, backbone or device.
    """
    import torch

    from dinokit.device import pick_device
    from dinokit.weights import load_backbone

    where = pick_device(device)
    if weights is not None:
        return load_backbone(weights).to(where)
    assert untrained is not None
    if "name" not in untrained:
        raise ValueError(f"backbone.name must be given; there is: {', '.join(shelves.names('backbones'))}.")
    name = untrained["name"]
    rest = {key: value for key, value in untrained.items() if key != "name"}
    torch.manual_seed(0)
    section = {"name": name, **section_values("backbones", name, rest, "backbone")}
    backbone: Backbone = shelves.build("backbones", section)
    return backbone.to(where).eval()


def run_evaluator(name: str, values: Mapping[str, Any], backbone: "Backbone") -> dict[str, float]:
    """The scores that evaluator `name` gives a backbone."""
    module = shelves.find("eval", name)
    return module.evaluate(module.Config(**values), backbone)
