"""Reads a recipe: a YAML file and `key=value` overrides become a checked Recipe.

A recipe is a YAML file in configs/ or anywhere else, completed by `key=value` overrides and by the defaults
in dinokit/config/recipe.py. Sections that name an entry of a registry (`backbone`, `losses`, `data`, `evals`)
are checked against its Config. Nothing here imports torch, so errors appear at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from dinokit.config.students import of_student, shares, take_student
from dinokit.config.values import (
    first_line,
    forget_reset,
    in_force,
    join_key,
    key_list,
    read_yaml,
    refuse_without_effect,
    validated,
    with_source,
)

__all__ = [
    "CropGroup", "Crops", "Head", "Heads", "Masks", "Optim", "Recipe", "Run", "Teacher",
    "checked_values", "load_recipe", "merge_settings", "parse_overrides",
    "read_data_section", "read_mapping", "read_recipe", "read_text_mapping", "run_dir_of", "section_values",
    "student_shares", "to_yaml", "unresolved",
]  # fmt: skip
# Texts with ${...} by their key and the value they gave: what is written keeps them unresolved.
_unresolved: dict[tuple[str, str], str] = {}

ReadArchitecture = Callable[[str], Mapping[str, Any]]  # from weights to the section `backbone` of their model


def load_recipe(
    recipe: str | Path, overrides: Sequence[str] = (), read_architecture: ReadArchitecture | None = None,
    of_run: bool = False,
) -> Recipe:  # fmt: skip
    """Read a recipe and apply `key=value` overrides.

    An override that changes the `name` of a section starts that section from the defaults of the new entry;
    null removes a section, and {} sets it to its defaults; later overrides add to what is left.

    Args:
        recipe: a path or a name in configs/. The recipe.yaml of a run sets run.out to the run's folder, also
            if that was moved.
        overrides: such as 'optim.lr=0.001'; with student=NAME, of a recipe of several students.
        read_architecture: completes a section `backbone` that has `weights` and no `name`.
        of_run: it was found in the folder of a run: modules that only it names are not imported.

    Raises:
        ValueError, LookupError: for an unknown recipe, key or name, an invalid or missing value, or settings
            that contradict each other; the error names the key and says how to correct it.
    """
    path = registry.find_recipe(recipe)
    values = read_mapping(path)
    if of_run:
        keys = [{"name": key} for section in ("losses", "evals") for key in values.get(section) or {}]
        # Names alone: of what it says about images, nothing is read, and a run may have its own from a hub.
        sections = [values.get(key) for key in ("backbone", "data", "evals")]
        named = [{"name": text} for key, text in registry.texts(sections) if key == "name"]
        registry.check_from_file([*keys, *named], path, "them")
    values.setdefault("name", path.stem)
    run_dir, run = run_dir_of(path), values.get("run") or {}
    if run_dir is not None and "out" in run and Path(run["out"]).resolve() != run_dir.resolve():
        values["run"] = {**run, "out": str(run_dir)}
    changes = _with_module_names(parse_overrides(overrides), values)
    forget_reset(values, overrides)
    _forget_old_weights(values.get("backbone"), changes.get("backbone"))
    student = take_student(values, changes, path, _merge)
    _merge(values, changes, "")
    complete = _complete(values, read_architecture)
    return of_student(complete, student) if student else complete


def student_shares(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, int]:
    """The share of the processes of each student of a recipe, by name; {} for a recipe of one student."""
    return shares(read_mapping(registry.find_recipe(recipe)), parse_overrides(overrides), _merge)


def _forget_old_weights(section: Any, changes: Any) -> None:
    """Remove the fingerprint of a recipe's initial weights from `section` if `changes` has other weights."""
    if isinstance(section, dict) and isinstance(changes, Mapping):
        old = section.get("weights")
        if changes.get("weights", old) != old:
            section.pop("fingerprint", None)


def _with_module_names(changes: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in which losses.my_package.spread.weight=1 is a key of the loss my_package.spread."""
    result = dict(changes)
    for section, kind in (("losses", "losses"), ("evals", "eval")):
        if isinstance(given := result.get(section), Mapping):
            result[section] = _joined(kind, given, {*registry.names(kind), *(values.get(section) or {})})
    return result


def _joined(kind: str, section: Mapping[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """{my_package: {spread: VALUE}} as {my_package.spread: VALUE}, if that is a module or in `known`."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        inner = {}
        if name not in known and not _is_module(kind, name) and isinstance(value, Mapping):
            inner = _joined(kind, value, known, f"{name}.")
        found = [each for each in inner if each in known or _is_module(kind, each)]
        # Without keys of its own, `name` is a package: inner names a module that is not there.
        package = bool(inner) and all(isinstance(each, Mapping) for each in inner.values())
        result |= inner if found or package else {name: value}
    return result


def _is_module(kind: str, name: str) -> bool:
    try:
        return "." in name and registry.locate(kind, name).is_file()
    except LookupError:
        return False


def run_dir_of(path: Path) -> Path | None:
    """The folder of the run whose recipe this file is; None for a file that belongs to no run."""
    return path.parent if path.name == "recipe.yaml" and (path.parent / "checkpoints").is_dir() else None


def read_text_mapping(text: str) -> dict[str, Any]:
    """The values of a recipe in a file of weights, unchecked and with ${...} as it stands; {} if damaged."""
    with suppress(Exception):  # as in parse_overrides
        values = read_yaml(text)
        return values if isinstance(values, dict) else {}
    return {}


def read_data_section(text: str, path: str | Path) -> dict[str, Any]:
    """The section `data` of a recipe in the file of weights `path`; its other sections are not checked.

    Raises:
        ValueError, LookupError: as load_recipe(); or for what registry.check_from_file() refuses.
    """
    try:
        data = dict(read_yaml(text)["data"])
    except Exception as error:  # as in parse_overrides
        raise ValueError(f"{path} has a recipe that cannot be read: {first_line(error)}") from None
    registry.check_from_file(data, path, "train.path and test.path")
    return _section("data.sources", data, "data")


def _complete(values: dict[str, Any], read_architecture: ReadArchitecture | None) -> Recipe:
    for key in ("backbone", "data"):
        if isinstance(given := values.get(key), str):
            known = given in registry.names("data.sources") or _is_module("data.sources", given)
            inside = "path" if key == "data" and not known else "name"
            raise ValueError(f"{key}={given}: it is a section. Give {key}.{inside}={given}")
    values = {**values, **{key: values.get(key) or {} for key in ("backbone", "losses", "data", "evals")}}
    recipe = Recipe(**validated(Recipe, values, ""))
    recipe.backbone = _backbone(values["backbone"], read_architecture)
    recipe.data = _section("data.sources", values.get("data"), "data")
    for kind, sections in (("losses", recipe.losses), ("eval", recipe.evals)):
        for name in sections:
            registry.locate(kind, name)  # also of one that is null: a typo would leave the loss in the recipe
    recipe.losses = {
        name: section_values("losses", name, section or {}, f"losses.{name}")
        for name, section in recipe.losses.items()
        if section is not None
    }
    evals = {name: section for name, section in recipe.evals.items() if section is not None}
    recipe.evals = {name: _eval_section(name, section or {}) for name, section in evals.items()}
    eval_values = [value for section in recipe.evals.values() for value in section.values()]
    given = (values.get("data") or {}).get("channels")
    if given is not None and given != recipe.backbone.get("channels", given):
        raise ValueError(
            f"data.channels={given}, but backbone.channels={recipe.backbone['channels']}: "
            f"give only the latter."
        )
    for source in (recipe.data, *(value for value in eval_values if isinstance(value, dict))):
        if "channels" in source and "channels" in recipe.backbone:
            source["channels"] = recipe.backbone["channels"]
    recipe.run.out = recipe.run.out or f"runs/{recipe.name}"
    check(recipe)
    _remember(values, asdict(recipe))
    return recipe


def _remember(values: object, resolved: Any, key: str = "") -> None:
    """Keep the texts with ${...} in `values`, for unresolved(). The elements of a list have its key."""
    if isinstance(values, str) and "${" in values:
        _unresolved[key, str(resolved)] = values
    elif isinstance(values, Mapping | list):
        for place, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            with suppress(KeyError, IndexError, TypeError):
                _remember(value, resolved[place], str(place) if isinstance(values, Mapping) else key)


def unresolved(values: Any, key: str = "") -> Any:
    """`values` as they were given, with ${...} in place of what it stood for: for what is written or sent."""
    if isinstance(values, Mapping):
        return {name: unresolved(value, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [unresolved(value, key) for value in values]
    return _unresolved.get((key, str(values)), values)


def section_values(
    kind: str, name: str, values: Mapping[str, Any], prefix: str, extra_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """checked_values() for the entry `name` of the registry `kind`; LookupError if there is none."""
    return checked_values(registry.read_config(kind, name), values, prefix, extra_keys)


def checked_values(
    cls: type[Any], values: Mapping[str, Any], prefix: str = "", extra_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """Check `values` of a section against a Config, and complete them by its defaults.

    A field of that Config with metadata {"registry": ...} is a section itself, or None; with "many", a
    mapping of sections. With "split" it is a source of images, by default one of folders.

    Args:
        cls: the Config, a dataclass.
        values: of the section.
        prefix: the key of the section, for errors.
        extra_keys: further keys to list in the error for an unknown key.

    Raises:
        ValueError, LookupError: as load_recipe(), and for a key that has no effect.
    """
    for item in fields(cls):
        if "registry" in item.metadata and isinstance(given := values.get(item.name), str):
            key = join_key(prefix, item.name)
            inside = f"{key}.NAME" if "many" in item.metadata else key
            raise ValueError(f"{key}={given}: it is a section. Give {inside}.path={given}")
    result = validated(cls, values, prefix, extra_keys)
    refuse_without_effect(cls, values, prefix, extra_keys)
    for item in fields(cls):
        if "registry" in item.metadata and result[item.name]:
            key, many = join_key(prefix, item.name), "many" in item.metadata
            sections = result[item.name] if many else {"": result[item.name]}
            checked = {label: _source(item, each, join_key(key, label)) for label, each in sections.items()}
            result[item.name] = checked if many else checked[""]
    _remember(values, result)
    return result


def _source(item: "Field[Any]", section: Any, prefix: str) -> dict[str, Any]:
    kind = item.metadata["registry"]
    if "split" in item.metadata and isinstance(section, Mapping) and "name" not in section:
        section = with_source(section, kind)
        if kind == "data.sources" and section["name"] == "folder":
            section = {"labels": "folders", **section}
    return _section(kind, section, prefix)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """['a.b=1', ...] as a nested dict; values are YAML. A section that is reset has only later keys.

    Raises:
        ValueError: if one has no '='.
    """
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"'{text}' is not of the form key=value.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{text}: settings are UTF-8, and this has other bytes. Rename the file or folder, or make a "
                f"link to it with another name."
            )
    try:
        result: Any = OmegaConf.to_container(OmegaConf.from_dotlist(in_force(overrides)))
    except Exception as error:  # errors of the YAML reader have no common base class in OmegaConf
        raise ValueError(
            f"These overrides cannot be read: {' '.join(overrides)}: {first_line(error)}"
        ) from None
    assert isinstance(result, dict)
    return result


def to_yaml(recipe: Any, template: bool = False) -> str:
    """The whole recipe, a dataclass with a section `run`, with every default; load_recipe() reads a Recipe.

    A template has no name, and no run.out if that follows from the name, so that a copy gets its own.
    """
    values = unresolved(asdict(recipe))
    once = {"resume": "auto", "images": "same"}  # choices of one command, not of all that resume
    values["run"] |= {key: value for key, value in once.items() if key in values["run"]}
    if template and values["run"]["out"] == f"runs/{values.pop('name')}":
        del values["run"]["out"]
    return OmegaConf.to_yaml(OmegaConf.create(values))


def read_mapping(path: Path, what: str = "recipe", holds: type[Any] = Recipe) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping.

    Args:
        path: of the file.
        what: the file is, for errors.
        holds: a dataclass with its keys, for errors.

    Raises:
        ValueError: if the file cannot be read, or is no mapping.
    """
    try:
        values: Any = read_yaml(path.read_text(encoding="utf-8"))
    except Exception as error:  # as in parse_overrides
        raise ValueError(f"{path} is not a {what}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} is not a {what}: it should hold keys such as {key_list(holds)}.")
    return values


def read_recipe(path: Path, config: type[Any]) -> Any:
    """The settings in a YAML file as `config`, a dataclass. Raises as checked_values()."""
    return config(**checked_values(config, read_mapping(path, holds=config)))


def merge_settings(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into a copy of `values`; a section with another `name` replaces the old section."""
    result = deepcopy(dict(values))
    _merge(result, changes, "evals")
    return result


def _merge(values: dict[str, Any], changes: Mapping[str, Any], prefix: str) -> None:
    for key, change in changes.items():
        old = values.get(key)
        if not isinstance(change, Mapping) or not isinstance(old, dict) or not change:
            values[key] = change
            continue
        renamed = (prefix == "" and key in ("backbone", "data")) or "." in join_key(prefix, key)
        if renamed and change.get("name", old.get("name")) != old.get("name"):
            values[key] = dict(change)
        else:
            _merge(old, change, join_key(prefix, key))


def _backbone(values: Any, read_architecture: ReadArchitecture | None) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return _section("models", values, "backbone")
    begin = {key: str(values[key]) for key in WEIGHT_KEYS if values.get(key)}
    rest = {key: value for key, value in values.items() if key not in WEIGHT_KEYS}
    if read_architecture is not None and "weights" in begin and "name" not in rest:
        rest = {**read_architecture(begin["weights"]), **rest}
    return {**_section("models", rest, "backbone"), **begin}


def _section(kind: str, values: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values.get("name"):
        raise ValueError(f"{prefix}.name must be given; there is: {', '.join(registry.names(kind))}.")
    rest = {key: value for key, value in values.items() if key != "name"}
    name = str(values["name"])
    _refuse_path(kind, name, rest, prefix)
    try:
        return {"name": name, **section_values(kind, name, rest, prefix)}
    except LookupError as error:
        raise LookupError(f"{prefix}.name: {error}") from None


def _refuse_path(kind: str, name: str, values: Mapping[str, Any], prefix: str) -> None:
    """Refuse a path for a source that reads no files, such as the built-in scenes of a recipe."""
    if "path" not in values or kind != "data.sources" or name not in registry.names(kind):
        return
    with_path = [n for n in registry.names(kind) if hasattr(registry.read_config(kind, n), "path")]
    if name not in with_path:
        others = [each for each in with_path if each != "folder"]
        raise ValueError(
            f"{prefix}.path={values['path']}: the recipe has {prefix}.name={name}, which reads no files. Add "
            f"{prefix}.name=folder for a folder of images, or {prefix}.name= one of {', '.join(others)}."
        )


def _eval_section(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"evals.{name}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix}={values}: it is a section. Give {prefix}.every={values}")
    rest = {key: value for key, value in values.items() if key != "every"}
    checked = section_values("eval", name, rest, prefix, ["every"])
    if not isinstance(every := values.get("every"), int) or every < 1:
        raise ValueError(
            f"{prefix}.every must be given: the number of steps between two evaluations, 1 or more."
        )
    return {"every": every, **checked}
