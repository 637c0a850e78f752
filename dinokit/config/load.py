"""From a YAML file to a Recipe; the one file where OmegaConf enters, and where it stops.

A recipe is a YAML file in configs/ or anywhere else, completed by `key=value` overrides and by the defaults
in dinokit/config/recipe.py. Sections that name an entry of a registry (`backbone`, `losses`, `data`, `evals`)
are checked against its Config. Nothing here imports torch, so a mistake is answered at once.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinokit.config import registry
from dinokit.config.check import check
from dinokit.config.recipe import (
    WEIGHT_KEYS,
    CropGroup,
    Crops,
    Head,
    Heads,
    Masks,
    Optim,
    Recipe,
    Run,
    Teacher,
)
from dinokit.config.values import first_line, join, keys_without_effect, listed, typed

__all__ = [
    "CropGroup",
    "Crops",
    "Head",
    "Heads",
    "Masks",
    "Optim",
    "Recipe",
    "Run",
    "Teacher",
    "keys_without_effect",
    "load_recipe",
    "merged",
    "parse_overrides",
    "read_data_section",
    "read_mapping",
    "run_dir_of",
    "section_values",
    "to_yaml",
]  # fmt: skip
BARE = {"data.sources": {"name": "folder", "labels": "folders"}, "data.dense": {"name": "folders"},
        "data.videos": {"name": "davis"}}  # fmt: skip


Look = Callable[[str], Mapping[str, Any]]  # from the name of weights to the section `backbone` they are of


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), look: Look | None = None) -> Recipe:
    """Read a recipe, a path or a name in configs/, and apply `key=value` overrides.

    An override that changes the `name` of a section starts that section from the new file's defaults, null
    takes a section out, and {} puts it back to its defaults. A
    section `backbone` with `weights` and no `name` is what `look` says of these, but for its own keys. The
    recipe.yaml of a run means that run, wherever its folder was moved.

    Raises:
        ValueError, LookupError: for an unknown recipe, key or name, a value that does not fit, a missing
            value, or settings that contradict each other; each names the key and the way out.
    """
    path = registry.find_recipe(recipe)
    values = read_mapping(path)
    values.setdefault("name", path.stem)
    home, run = run_dir_of(path), values.get("run") or {}
    if home is not None and "out" in run and Path(run["out"]).resolve() != home.resolve():
        values["run"] = {**run, "out": str(home)}
    _merge(values, parse_overrides(overrides), "")
    return _complete(values, look)


def run_dir_of(path: Path) -> Path | None:
    """The folder of the run that keeps this file as its recipe, or nothing: the file is only a recipe."""
    return path.parent if path.name == "recipe.yaml" and (path.parent / "checkpoints").is_dir() else None


def read_data_section(text: str) -> dict[str, Any]:
    """The section `data` of a recipe that to_yaml() wrote; nothing else of it needs to be readable here.

    Raises:
        ValueError, LookupError: as load_recipe().
    """
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    return _section("data.sources", values["data"], "data")


def _complete(values: dict[str, Any], look: Look | None) -> Recipe:
    values = {**values, **{key: values.get(key) or {} for key in ("backbone", "losses", "data", "evals")}}
    done = Recipe(**typed(Recipe, values, ""))
    done.backbone = _backbone(values["backbone"], look)
    done.data = _section("data.sources", values.get("data"), "data")
    done.losses = {
        name: section_values("losses", name, section or {}, f"losses.{name}")
        for name, section in done.losses.items()
        if section is not None
    }
    evals = {name: section for name, section in done.evals.items() if section is not None}
    done.evals = {name: _eval_section(name, section or {}) for name, section in evals.items()}
    inside = [value for section in done.evals.values() for value in section.values()]
    given = (values.get("data") or {}).get("channels")
    if given is not None and given != done.backbone.get("channels", given):
        raise ValueError(
            f"data.channels={given}, but backbone.channels={done.backbone['channels']}: give only the latter."
        )
    for source in (done.data, *(value for value in inside if isinstance(value, dict))):
        if "channels" in source and "channels" in done.backbone:
            source["channels"] = done.backbone["channels"]
    done.run.out = done.run.out or f"runs/{done.name}"
    check(done)
    return done


def section_values(
    shelf: str, name: str, values: Mapping[str, Any], where: str, besides: Sequence[str] = ()
) -> dict[str, Any]:
    """`values` of a section, checked against the Config of shelf/name and completed by its defaults.

    A field of that Config with metadata {"registry": ...} is itself a section, or none; with "many", a
    section for each of the names in it. One with a "split" is a source of images with labels or
    maps: without a name, one of folders.

    Raises:
        ValueError, LookupError: as `load_recipe`, and for a value that nothing reads; `where` is put before
            the key, and `besides` named as well where keys are listed.
    """
    cls = registry.read_config(shelf, name)
    done = typed(cls, values, where, besides)
    _refuse_unread(keys_without_effect(cls, values, where, besides), where)
    for item in fields(cls):
        if "registry" in item.metadata and done[item.name]:
            key, many = join(where, item.name), "many" in item.metadata
            sections = done[item.name] if many else {"": done[item.name]}
            checked = {label: _source(item, each, join(key, label)) for label, each in sections.items()}
            done[item.name] = checked if many else checked[""]
    return done


def _refuse_unread(why: Mapping[str, str], where: str) -> None:
    if why:
        reasons = dict.fromkeys(why.values())
        keys = {reason: [join(where, key) for key in why if why[key] == reason] for reason in reasons}
        said = "; ".join(f"{', '.join(some)}: {reason}" for reason, some in keys.items())
        raise ValueError(f"{said}. Leave out what nothing would read, or change what it is read with.")


def _source(item: "Field[Any]", section: Any, where: str) -> dict[str, Any]:
    if "split" in item.metadata and isinstance(section, Mapping) and "name" not in section:
        section = {**BARE[item.metadata["registry"]], **section}
    return _section(item.metadata["registry"], section, where)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """['a.b=1', ...] as a nested dict; values are YAML.

    Raises:
        ValueError: if one has no '='.
    """
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"'{text}' is not of the form key=value.")
    try:
        done: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # the YAML reader's own errors have no common base that OmegaConf exports
        asked = " ".join(overrides)
        raise ValueError(f"These overrides cannot be read: {asked}: {first_line(error)}") from None
    assert isinstance(done, dict)
    return done


def to_yaml(recipe: Recipe, template: bool = False) -> str:
    """The whole recipe, every default filled in; `load_recipe` reads it back.

    A template leaves out the name, and the folder if it follows from it, so that a copy has its own.
    """
    values = asdict(recipe)
    if template and values["run"]["out"] == f"runs/{values.pop('name')}":
        del values["run"]["out"]
    return OmegaConf.to_yaml(OmegaConf.create(values))


def read_mapping(path: Path, what: str = "recipe", holds: type[Any] = Recipe) -> dict[str, Any]:
    """What a YAML file holds; a ValueError if it cannot be read, or is no `what`, with keys as in `holds`."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # as in parse_overrides
        raise ValueError(f"{path} is not a {what}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a {what}: it should hold keys such as {listed(holds)}.")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, section by section; one that changes a section's `name` takes its place."""
    done = deepcopy(dict(values))
    _merge(done, changes, "evals")
    return done


def _merge(values: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    for key, change in changes.items():
        old = values.get(key)
        if not isinstance(change, Mapping) or not isinstance(old, dict) or not change:
            values[key] = change
            continue
        renamed = (where == "" and key in ("backbone", "data")) or "." in join(where, key)
        if renamed and change.get("name", old.get("name")) != old.get("name"):
            values[key] = dict(change)
        else:
            _merge(old, change, join(where, key))


def _backbone(values: Any, look: Look | None) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return _section("models", values, "backbone")
    begin = {key: str(values[key]) for key in WEIGHT_KEYS if values.get(key)}
    rest = {key: value for key, value in values.items() if key not in WEIGHT_KEYS}
    if look is not None and "weights" in begin and "name" not in rest:
        rest = {**look(begin["weights"]), **rest}
    return {**_section("models", rest, "backbone"), **begin}


def _section(shelf: str, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values.get("name"):
        raise ValueError(f"{where}.name must be given; there is: {', '.join(registry.names(shelf))}.")
    rest = {key: value for key, value in values.items() if key != "name"}
    name = str(values["name"])
    try:
        return {"name": name, **section_values(shelf, name, rest, where)}
    except LookupError as error:
        raise LookupError(f"{where}.name: {error}") from None


def _eval_section(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    where = f"evals.{name}"
    if not isinstance(values, Mapping) or not isinstance(values.get("every"), int) or values["every"] < 1:
        raise ValueError(
            f"{where}.every must be given: the number of steps between two evaluations, 1 or more."
        )
    rest = {key: value for key, value in values.items() if key != "every"}
    return {"every": values["every"], **section_values("eval", name, rest, where)}
