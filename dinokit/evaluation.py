"""Judging a backbone on labelled images: what is judged, on which data, by which evaluator.

Settings are checked without torch, as in dinokit.config.load, so a mistake is answered at once; the imports
that need it wait until there is a backbone to load.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dinokit.config import registry
from dinokit.config.load import keys_without_effect, merged, read_data_section, read_mapping, section_values

if TYPE_CHECKING:
    from dinokit import models
from dinokit.models import Backbone

LAID_OUT = {  # what a folder holds that is given by its path alone
    "data.sources": "one sub-folder a class",
    "data.dense": "images/ and masks/ or depth/",
    "data.videos": "JPEGImages/ and Annotations/",
}


def source_fields(name: str) -> dict[str, str]:
    """The fields of an evaluator's Config that must be sources, with the split that each stands for."""
    config = registry.read_config("eval", name)
    wanted = [
        f for f in fields(config) if "split" in f.metadata and not {"optional", "many"} & set(f.metadata)
    ]
    return {f.name: f.metadata["split"] for f in wanted}


def needs_labels(name: str) -> bool:
    """Whether an evaluator asks for labelled images."""
    config = registry.read_config("eval", name)
    return any(f.metadata.get("labels", True) for f in fields(config) if "split" in f.metadata)


def with_start(name: str, values: Mapping[str, Any], start: str) -> dict[str, Any]:
    """`values` of an evaluator, with the weights that a run began with where it compares with them."""
    config = registry.read_config("eval", name)
    keys = [f.name for f in fields(config) if "start" in f.metadata and not values[f.name]]
    return {**values, **dict.fromkeys(keys, start)}


def with_data(name: str, values: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """`values` of an evaluator, each source that is not given filled in from a run's section `data`.

    Raises:
        ValueError: if one is not given, and there is no data with splits to take it from.
    """
    done = dict(values)
    shelf_of = {f.name: f.metadata.get("registry", "") for f in fields(registry.read_config("eval", name))}
    for key, split in source_fields(name).items():
        if done[key] is None:
            shelf = shelf_of[key]
            known = (
                data and "split" in data and ("." in data["name"] or data["name"] in registry.names(shelf))
            )
            if data is None or not known:
                raise ValueError(f"{key}.path (a folder with {LAID_OUT[shelf]}) or {key}.name must be given.")
            has = {f.name for f in fields(registry.read_config(shelf, data["name"]))} | {"name"}
            done[key] = {key: value for key, value in {**data, "split": split}.items() if key in has}
    return done


def trained_on(weights: str) -> dict[str, Any] | None:
    """The section `data` of the recipe that trained a file's weights, or None if the file does not say.

    Raises:
        ValueError, LookupError: if there are no such weights, or their source is not to be had here.
    """
    from dinokit.weights import describe

    recipe = describe(weights)["recipe"]
    return read_data_section(recipe) if recipe else None


def architecture(weights: str) -> dict[str, Any]:
    """The section `backbone` that a file's or a run's weights are of.

    Raises:
        ValueError, LookupError: if there are no such weights.
    """
    from dinokit.weights import describe

    return dict(describe(weights)["backbone"])


def load_judged(weights: str | None, made: Mapping[str, Any] | None, device: str) -> "Backbone":
    """The backbone to judge.

    Args:
        weights: a file or a run; or None, and then:
        made: the section `backbone` of one as its own code makes it: what that draws, it draws from seed 0.
        device: as run.device.

    Raises:
        ValueError, LookupError: if there are no such weights, backbone or device.
    """
    import torch

    from dinokit.runtime.device import pick_device
    from dinokit.weights import load_backbone

    where = pick_device(device)
    if weights is not None:
        return load_backbone(weights).to(where)
    assert made is not None
    if "name" not in made:
        raise ValueError(f"backbone.name must be given; there is: {', '.join(registry.names('backbones'))}.")
    name = made["name"]
    rest = {key: value for key, value in made.items() if key != "name"}
    torch.manual_seed(0)
    section = {"name": name, **section_values("models", name, rest, "backbone")}
    backbone = models.build(section)
    return backbone.to(where).eval()


def describe_judged(weights: str | None, backbone: "Backbone") -> dict[str, Any]:
    """What a result says of the backbone and of where it was judged."""
    from dinokit.features import device_of, fingerprint
    from dinokit.weights import describe

    trained = re.search(r"^name: (.+)$", describe(weights)["recipe"] if weights else "", re.MULTILINE)
    return {
        "fingerprint": fingerprint(backbone, settings=True),
        "recipe": trained[1] if trained else "",
        "device": str(device_of(backbone)),
    }


def transform_of(values: Mapping[str, Any], backbone: "Backbone") -> dict[str, Any]:
    """How images were shown: sizes in pixels as far as they were set, and the normalisation."""
    shown = backbone.input
    sizes = {"size": values.get("size") or shown.size, "resize": values.get("resize") or None}
    return {**sizes, "mean": list(shown.mean), "std": list(shown.std)}


def run_evaluator(name: str, values: Mapping[str, Any], backbone: "Backbone") -> dict[str, float]:
    """The scores that evaluator `name` gives a backbone."""
    module = registry.find("eval", name)
    return module.evaluate(module.Config(**values), backbone)


@dataclass
class Planned:
    """One evaluation of a list."""

    label: str  # its name in the list
    name: str  # of the evaluator
    values: dict[str, Any]


def read_list(recipe: str, overrides: Mapping[str, Any]) -> list[Planned]:
    """The evaluations that a recipe eval_*.yaml lists, in its order, each with its settings checked.

    Such a recipe has a section for each, called as its evaluator, or with a name of its own and a key `eval`.
    What stands in the section `all` goes to every evaluator that has the key and reads it, beneath its own
    section. So does an override that begins with none of these names, above it. An override may change what
    else is read, a `method` say: what the recipe has for the other one is left out. As in a recipe for
    training, null takes a section out, and {} puts it back to its defaults.

    Raises:
        ValueError, LookupError: for an unknown recipe, evaluator, key or value.
    """
    path = registry.find_recipe(recipe, "eval")
    listed = read_mapping(path)
    everywhere = listed.pop("all", None) or {}
    typed = {key: value for key, value in overrides.items() if key not in listed}
    changes = {label: overrides[label] for label in listed if label in overrides}
    for label, section in (*listed.items(), *changes.items()):
        if not isinstance(section, Mapping | None):
            raise ValueError(f"{label}={section}: it is a section, as in {label}.KEY={section}.")
    listed = {label: section or {} for label, section in listed.items()}
    plan: list[Planned] = []
    read: set[str] = set()
    for label, section in listed.items():
        changed = changes.get(label, {})
        if label in changes and not changed:  # null or {}
            if changed is None:
                continue
            section = {key: value for key, value in section.items() if key == "eval"}
        own = merged(section, changed)
        name = str(own.pop("eval", label))
        config = registry.read_config("eval", name)
        known = {f.name for f in fields(config)}
        below, above = ({k: v for k, v in keys.items() if k in known} for keys in (everywhere, typed))
        values = merged(merged(merged(below, section), above), changed)
        values.pop("eval", None)
        asked = changed.keys() if changed or above else section.keys()
        left_out = keys_without_effect(config, values, label).keys() - asked
        values = {key: value for key, value in values.items() if key not in left_out}
        read |= (below.keys() | above.keys()) & values.keys()
        plan.append(Planned(label, name, section_values("eval", name, values, label)))
    for key in sorted((everywhere.keys() | typed.keys()) - read):
        raise ValueError(
            f"No evaluator of {path.name} reads a key '{key}'.{registry.suggest(key, list(listed))} "
            f"It lists: {', '.join(listed)}."
        )
    return plan
