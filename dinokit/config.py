"""From a YAML file to a Recipe; the one file where OmegaConf enters, and where it stops.

A recipe is a YAML file in configs/ or anywhere else, completed by `key=value` overrides and by the defaults
in dinokit/recipe.py. Sections that name a file on a shelf (`backbone`, `losses`, `data`, `evals`) are checked
against that file's Config. Nothing here imports torch, so a mistake is answered at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinokit import shelves
from dinokit.check import check
from dinokit.recipe import BEGINNING, CropGroup, Crops, Head, Heads, Masks, Optim, Recipe, Run, Teacher

__all__ = [
    "CropGroup", "Crops", "Head", "Heads", "Masks", "Optim", "Recipe", "Run", "Teacher",
    "data_section", "load_recipe", "parse_overrides", "section_values", "to_yaml",
]  # fmt: skip


Look = Callable[[str], Mapping[str, Any]]  # from the name of weights to the section `backbone` they are of


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), look: Look | None = None) -> Recipe:
    """Read a recipe, a path or a name in configs/, and apply `key=value` overrides.

    An override that changes the `name` of a section starts that section from the new file's defaults. A
    section `backbone` with `weights` and no `name` is what `look` says of these, but for its own keys.

    Raises:
        ValueError, LookupError: for an unknown recipe, key or name, a value that does not fit, a missing
            value, or settings that contradict each other; each names the key and the way out.
    """
    path = shelves.find_recipe(recipe)
    values = _read_yaml(path)
    values.setdefault("name", path.stem)
    _merge(values, parse_overrides(overrides), "")
    return _complete(values, look)


def data_section(text: str) -> dict[str, Any]:
    """The section `data` of a recipe that to_yaml() wrote; nothing else of it needs to be readable here.

    Raises:
        ValueError, LookupError: as load_recipe().
    """
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    return _section("data.sources", values["data"], "data")


def _complete(values: dict[str, Any], look: Look | None) -> Recipe:
    values = {**values, **{key: values.get(key) or {} for key in ("backbone", "losses", "data", "evals")}}
    done = Recipe(**_typed(Recipe, values, ""))
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


def section_values(shelf: str, name: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` of a section, checked against the Config of shelf/name and completed by its defaults.

    A field of that Config with metadata {"shelf": ...} is itself a section, or none. One with a "split" is a
    labelled source: without a name, a folder with one sub-folder a class.

    Raises:
        ValueError, LookupError: as `load_recipe`; `where` is put before the key.
    """
    cls = shelves.read_config(shelf, name)
    done = _typed(cls, values, where)
    for item in fields(cls):
        if "shelf" in item.metadata and done[item.name]:
            section = done[item.name]
            if "split" in item.metadata and "name" not in section:
                section = {"name": "folder", "labels": "folders", **section}
            done[item.name] = _section(item.metadata["shelf"], section, _join(where, item.name))
    return done


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
        raise ValueError(f"These overrides cannot be read: {asked}: {_first_line(error)}") from None
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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # as in parse_overrides
        raise ValueError(f"{path} is not a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it should hold the sections {_list(Recipe)}.")
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    for key, change in changes.items():
        old = values.get(key)
        if not isinstance(change, Mapping) or not isinstance(old, dict):
            values[key] = change
            continue
        renamed = (where == "" and key in ("backbone", "data")) or "." in _join(where, key)
        if renamed and change.get("name", old.get("name")) != old.get("name"):
            values[key] = dict(change)
        else:
            _merge(old, change, _join(where, key))


def _backbone(values: Any, look: Look | None) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return _section("backbones", values, "backbone")
    begin = {key: str(values[key]) for key in BEGINNING if values.get(key)}
    rest = {key: value for key, value in values.items() if key not in BEGINNING}
    if look is not None and "weights" in begin and "name" not in rest:
        rest = {**look(begin["weights"]), **rest}
    return {**_section("backbones", rest, "backbone"), **begin}


def _section(shelf: str, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values.get("name"):
        raise ValueError(f"{where}.name must be given; there is: {', '.join(shelves.names(shelf))}.")
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


def _typed(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    _unknown_keys(cls, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(values)))
        absent = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if absent:
            keys = [_join(where, key) for key in absent]
            raise ValueError(f"{' and '.join(keys)} must be given, as in {keys[0]}=VALUE.")
        done = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{_culprit(cls, values, where)}: {_first_line(error)}.") from None
    return {item.name: getattr(done, item.name) for item in fields(cls)}


def _culprit(cls: type[Any], values: Mapping[str, Any], where: str) -> str:
    """The key whose value does not fit: OmegaConf's error does not always name it."""
    for item in fields(cls):
        if item.name in values:
            key, value = _join(where, item.name), values[item.name]
            try:
                OmegaConf.merge(OmegaConf.structured(cls), {item.name: value})
            except OmegaConfBaseException:
                inner = _dataclass_of(item)
                return _culprit(inner, value, key) if inner and isinstance(value, Mapping) else key
    return where


def _unknown_keys(cls: type[Any], values: object, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values}: it is a section, which may hold: {_list(cls) or 'nothing'}.")
    known = {item.name: item for item in fields(cls)}
    for key, value in values.items():
        if key not in known:
            inside = f" in '{where}'" if where else ""
            raise ValueError(
                f"{_join(where, str(key))}: there is no key '{key}'{inside}."
                f"{shelves.suggest(str(key), list(known))} There is: {_list(cls) or 'nothing to set'}."
            )
        inner = _dataclass_of(known[key])
        if inner is not None and value is not None:
            _unknown_keys(inner, value, _join(where, key))


def _dataclass_of(item: "Field[Any]") -> type[Any] | None:
    options = getattr(item.type, "__args__", (item.type,))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _list(cls: type[Any]) -> str:
    return ", ".join(f"{f.name}{' (must be given)' if _required(f) else ''}" for f in fields(cls))


def _required(item: "Field[Any]") -> bool:
    return item.default == MISSING or (item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where and key else where or key


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
