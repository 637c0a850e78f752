"""Evaluates a backbone: the settings and data of evaluators, lists of evaluations, the backbone to load.

Settings are checked without torch, as in dinokit.config.load, so a mistake is reported at once. Functions
that need torch import it themselves.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dinokit.config import registry
from dinokit.config.load import merge_settings, read_data_section, read_mapping, section_values
from dinokit.config.values import keys_without_effect

if TYPE_CHECKING:
    from dinokit.models import Backbone


FOLDER_LAYOUTS = {  # of a source that is given by its path alone
    "data.sources": "one sub-folder a class",
    "data.dense": "images/ and masks/ or depth/",
    "data.videos": "JPEGImages/ and Annotations/",
    "data.clips": "one sub-folder a class, with videos or folders of frames",
    "data.pairs": "JPEGImages/, PairAnnotation/ and Layout/",
    "data.captions": "images, each with a text file of captions beside it",
    "data.objects": "images, each with a JSON file of masks beside it",
}


def source_fields(name: str) -> dict[str, str]:
    """The fields of an evaluator's Config that must be given as sources, with the split of each."""
    config = registry.read_config("eval", name)
    required = [
        f for f in fields(config) if "split" in f.metadata and not {"optional", "many"} & set(f.metadata)
    ]
    return {f.name: f.metadata["split"] for f in required}


def registries(name: str) -> set[str]:
    """The registries that an evaluator's sources are of, such as data.sources."""
    config = registry.read_config("eval", name)
    return {f.metadata.get("registry", "") for f in fields(config) if "split" in f.metadata}


def needs_labels(name: str) -> bool:
    """Whether an evaluator needs labelled images."""
    config = registry.read_config("eval", name)
    return any(f.metadata.get("labels", True) for f in fields(config) if "split" in f.metadata)


def with_initial_weights(name: str, values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """`values` of an evaluator; one that compares with a run's initial weights gets their path."""
    config = registry.read_config("eval", name)
    keys = [f.name for f in fields(config) if "start" in f.metadata and not values[f.name]]
    return {**values, **dict.fromkeys(keys, path)}


def with_data(name: str, values: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """`values` of an evaluator; sources that are not given are filled in from a run's section `data`.

    Raises:
        ValueError: if one is not given, and there is no data with splits to take it from.
    """
    result = dict(values)
    kinds = {f.name: f.metadata.get("registry", "") for f in fields(registry.read_config("eval", name))}
    for key, split in source_fields(name).items():
        if result[key] is None:
            usable = (
                data is not None
                and "split" in data
                and ("." in data["name"] or data["name"] in registry.names(kinds[key]))
            )
            if data is None or not usable:
                raise ValueError(
                    f"{key}.path (a folder with {FOLDER_LAYOUTS[kinds[key]]}) or {key}.name must be given."
                )
            if data.get("labels") == "none" and needs_labels(name):
                here = f"{data['name']}, {data['path']}" if data.get("path") else data["name"]
                raise ValueError(
                    f"{name} needs labels, and the images of the training ({here}) were read without any. "
                    f"Give train.path=FOLDER and test.path=FOLDER with {FOLDER_LAYOUTS[kinds[key]]}."
                )
            keys = {f.name for f in fields(registry.read_config(kinds[key], data["name"]))} | {"name"}
            result[key] = {key: value for key, value in {**data, "split": split}.items() if key in keys}
    return result


def training_data(weights: str) -> dict[str, Any] | None:
    """The section `data` of the recipe that trained a file's weights, or None if the file does not say.

    Raises:
        ValueError, LookupError: if there are no such weights, or their source does not exist here.
    """
    from dinokit.weights import describe

    recipe = describe(weights)["recipe"]
    return read_data_section(recipe, weights) if recipe else None


def architecture(weights: str) -> dict[str, Any]:
    """The section `backbone` of a file's or a run's weights.

    Raises:
        ValueError, LookupError: if there are no such weights.
    """
    from dinokit.weights import describe

    section = dict(describe(weights)["backbone"])
    registry.check_from_file(section, weights, "backbone.name")
    return section


def load_evaluated(weights: str | None, section: Mapping[str, Any] | None, device: str) -> "Backbone":
    """The backbone to evaluate.

    Args:
        weights: a file or a run; or None.
        section: without `weights`, a section `backbone`; its weights are those that it names, or else the
            initial ones with seed 0.
        device: as run.device.

    Raises:
        ValueError, LookupError: if there are no such weights, backbone or device.
    """
    import torch

    from dinokit.runtime.device import pick_device
    from dinokit.weights import build_section, load_backbone

    target = pick_device(device)
    if weights is not None:
        return load_backbone(weights).to(target)
    assert section is not None
    torch.manual_seed(0)
    return build_section(section).to(target)


def describe_evaluated(weights: str | None, backbone: "Backbone") -> dict[str, Any]:
    """What a result records about the backbone and the device."""
    from dinokit.features import device_of, fingerprint
    from dinokit.weights import describe

    trained = re.search(r"^name: (.+)$", describe(weights)["recipe"] if weights else "", re.MULTILINE)
    return {
        "fingerprint": fingerprint(backbone, settings=True),
        "recipe": trained[1] if trained else "",
        "device": str(device_of(backbone)),
    }


def transform_of(values: Mapping[str, Any], backbone: "Backbone") -> dict[str, Any]:
    """How images were preprocessed: sizes in pixels as far as they were set, and the normalisation."""
    shown = backbone.input
    sizes = {"size": values.get("size") or shown.size, "resize": values.get("resize") or None}
    return {**sizes, "mean": list(shown.mean), "std": list(shown.std)}


def run_evaluator(name: str, values: Mapping[str, Any], backbone: "Backbone") -> dict[str, float]:
    """The scores of a backbone by evaluator `name`, on images with as many channels as it takes."""
    module = registry.find("eval", name)
    given = dict(values)

    def with_channels(section: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**section, "channels": backbone.channels} if "channels" in section else section

    for item in fields(module.Config):
        if "registry" in item.metadata and (section := given.get(item.name)):
            if "many" in item.metadata:  # a section for each of several names
                given[item.name] = {key: with_channels(each) for key, each in section.items()}
            else:
                given[item.name] = with_channels(section)
    if "." not in name:
        return module.evaluate(module.Config(**given), backbone)
    before, mode = _versions(backbone), backbone.training  # of another package
    scores = module.evaluate(module.Config(**given), backbone)
    backbone.train(mode)
    if _versions(backbone) != before:  # in a training it is the moving average, and would stay changed
        raise ValueError(
            f"{name} changed the weights of the backbone that it evaluates. Let it tune a copy: "
            f"copy.deepcopy(backbone)."
        )
    return _numbers(name, scores)


def _versions(backbone: "Backbone") -> list[int]:
    """How often each parameter was changed in place, as torch counts it; 0 where it does not."""
    return [0 if each.is_inference() else each._version for each in backbone.parameters()]


def _numbers(name: str, scores: Any) -> dict[str, float]:
    """The scores of an evaluator of another package as floats; tensors of one number too."""
    if not isinstance(scores, Mapping):
        raise ValueError(
            f"{name}: evaluate(cfg, backbone) must return a dict of numbers by name, not "
            f"{'nothing' if scores is None else f'a {type(scores).__name__}'}."
        )
    result = {}
    for key, value in scores.items():
        try:
            result[str(key)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name}: the score '{key}' must be one number, and is {value!r:.80}.") from None
    return result


def _by_section(overrides: Mapping[str, Any], listed: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which {my_package: {counting: KEYS}} is {my_package.counting: KEYS}, if that is listed."""
    result = deepcopy(dict(overrides))
    for label in listed:
        *outer, last = label.split(".")
        sections: list[dict[str, Any]] = [result]
        for each in outer:
            inner = sections[-1].get(each)
            sections.append(inner if isinstance(inner, dict) else {})
        if outer and last in sections[-1]:
            result[label] = sections[-1].pop(last)
            for above, each in reversed([*zip(sections, outer, strict=False)]):
                if not above[each]:
                    del above[each]
    return result


@dataclass
class EvalJob:
    """One evaluation of a list."""

    label: str  # its name in the list
    name: str  # of the evaluator
    values: dict[str, Any]


def read_list(recipe: str, overrides: Mapping[str, Any]) -> list[EvalJob]:
    """The evaluations in a recipe eval_*.yaml, in its order, each with its settings checked.

    Such a recipe has a section for each evaluation, named as its evaluator, or with another name and a key
    `eval`. Keys of the section `all` go to every evaluator that has and reads them, unless its own section
    sets them. An override that does not begin with a section's name also goes to every evaluator, and
    replaces the value of its section. If an override changes which keys are read, such as a `method`, keys
    of the recipe that are no longer read are left out. As in a training recipe, null removes a section, and
    {} resets it to its defaults.

    Raises:
        ValueError, LookupError: for an unknown recipe, evaluator, key or value.
    """
    path = registry.find_recipe(recipe, "eval")
    sections = read_mapping(path)
    overrides = _by_section(overrides, sections)
    common = sections.pop("all", None) or {}
    common_overrides = {key: value for key, value in overrides.items() if key not in sections}
    changes = {label: overrides[label] for label in sections if label in overrides}
    for label, section in (*sections.items(), *changes.items()):
        if not isinstance(section, Mapping | None):
            raise ValueError(f"{label}={section}: it is a section, as in {label}.KEY={section}.")
    jobs: list[EvalJob] = []
    read: set[str] = set()
    for label, section in sections.items():
        section, changed = section or {}, changes.get(label, {})
        if changed is None:  # null removes the evaluation
            continue
        if label in changes and not changed:  # {} resets it
            section = {key: value for key, value in section.items() if key == "eval"}
        job, keys = _job(label, section, changed, common, common_overrides)
        jobs.append(job)
        read |= keys
    for key in sorted((common.keys() | common_overrides.keys()) - read):
        raise ValueError(
            f"No evaluator of {path.name} reads a key '{key}'.{registry.suggest(key, list(sections))} "
            f"It lists: {', '.join(sections)}."
        )
    return jobs


def _job(
    label: str, section: Mapping[str, Any], changed: Mapping[str, Any], common: Mapping[str, Any],
    common_overrides: Mapping[str, Any],
) -> tuple[EvalJob, set[str]]:  # fmt: skip
    """An evaluation of a list, and the common keys that it reads; `changed` has overrides of `section`."""
    name = str(merge_settings(section, changed).get("eval", label))
    config = registry.read_config("eval", name)
    known = {f.name for f in fields(config)}
    below, above = ({k: v for k, v in keys.items() if k in known} for keys in (common, common_overrides))
    values = below
    for later in (section, above, changed):  # each replaces what stands before it
        values = merge_settings(values, later)
    values.pop("eval", None)
    asked = changed.keys() if changed or above else section.keys()
    left_out = keys_without_effect(config, values, label).keys() - asked
    values = {key: value for key, value in values.items() if key not in left_out}
    job = EvalJob(label, name, section_values("eval", name, values, label))
    return job, (below.keys() | above.keys()) & values.keys()
