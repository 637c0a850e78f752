"""Values against a dataclass: unknown keys, wrong types, missing values, in words that name the key."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinokit.config import registry


def typed(
    cls: type[Any], values: Mapping[str, Any], where: str, besides: Sequence[str] = ()
) -> dict[str, Any]:
    """`values` as the fields of `cls`, defaults filled in.

    Raises:
        ValueError: naming the key, `where` put before it; for an unknown one, those that there are, with
            `besides`, which others take.
    """
    _unknown_keys(cls, values, where, besides)
    try:
        given = OmegaConf.create(dict(values))
        merged = OmegaConf.merge(OmegaConf.structured(cls), given)
        # Also what `given` says must be given, in whose place merge() puts a default.
        absent = sorted({str(key) for some in (given, merged) for key in OmegaConf.missing_keys(some)})
        if absent:
            keys = [join(where, key) for key in absent]
            raise ValueError(f"{' and '.join(keys)} must be given, as in {keys[0]}=VALUE.")
        done = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key, near = _culprit(cls, values, where)
        if "is not a TupleConfig" in str(error):  # OmegaConf speaks of its own classes
            raise ValueError(
                f"{key}: it is a list, in brackets also if it has one item: {key}=[...]."
            ) from None
        raise ValueError(f"{key}: {first_line(error)}.{near}") from None
    return {item.name: getattr(done, item.name) for item in fields(cls)}


def keys_without_effect(
    cls: type[Any], values: Mapping[str, Any], where: str, besides: Sequence[str] = ()
) -> dict[str, str]:
    """Those of `values` that nothing reads as the others are, each with why (registry.only_if).

    A value that would be there anyway is none of them: a run writes every default into its recipe.

    Raises:
        ValueError: as typed().
    """
    others = {f.name: f.metadata["only_if"] for f in fields(cls) if "only_if" in f.metadata}
    done = typed(cls, values, where, besides)
    usual = typed(cls, {key: value for key, value in values.items() if key not in others}, where, besides)
    why = {}
    for key in (key for key in values if key in others and done[key] != usual[key]):
        for other, wanted in others[key].items():
            there = done[other]
            if not (bool(there) is wanted if isinstance(wanted, bool) else there in wanted):
                shown = there if isinstance(there, str) else json.dumps(there, default=list)
                here = (
                    f"here {join(where, other)}={shown}"
                    if there or there is False
                    else f"{join(where, other)} is not given"
                )
                why[key] = f"only {registry.condition_text(other, wanted)}, and {here}"
                break
    return why


def _culprit(cls: type[Any], values: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The key whose value does not fit, as OmegaConf's error does not always name it; and what was meant."""
    for item in fields(cls):
        if item.name in values:
            key, value = join(where, item.name), values[item.name]
            try:
                OmegaConf.merge(OmegaConf.structured(cls), {item.name: value})
            except OmegaConfBaseException:
                inner = _dataclass_of(item)
                if inner and isinstance(value, Mapping):
                    return _culprit(inner, value, key)
                return key, registry.suggest(
                    str(value), _words(item.type), alike=0.7
                )  # short: val is not all
    return where, ""


def _words(kind: object) -> list[str]:
    """Those that a type lets pass."""
    parts = getattr(kind, "__args__", ())
    return [word for part in parts for word in ([part] if isinstance(part, str) else _words(part))]


def _unknown_keys(cls: type[Any], values: object, where: str, besides: Sequence[str] = ()) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values}: it is a section, which may hold: {listed(cls) or 'nothing'}.")
    known = {item.name: item for item in fields(cls)}
    for key, value in values.items():
        if key not in known:
            inside = f" in '{where}'" if where else ""
            near = registry.suggest(str(key), [*besides, *known])
            have = ", ".join(filter(None, [*besides, listed(cls)]))
            raise ValueError(
                f"{join(where, str(key))}: there is no key '{key}'{inside}.{near} "
                f"There is: {have or 'nothing to set'}."
            )
        inner = _dataclass_of(known[key])
        if inner is not None and value is not None:
            _unknown_keys(inner, value, join(where, key))


def _dataclass_of(item: "Field[Any]") -> type[Any] | None:
    options = getattr(item.type, "__args__", (item.type,))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def listed(cls: type[Any]) -> str:
    """The keys of a dataclass."""
    return ", ".join(f"{f.name}{' (must be given)' if _required(f) else ''}" for f in fields(cls))


def _required(item: "Field[Any]") -> bool:
    return item.default == MISSING or (item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT)


def join(where: str, key: str) -> str:
    """The key inside a section."""
    return f"{where}.{key}" if where and key else where or key


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
