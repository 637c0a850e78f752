"""Validates values against a dataclass: unknown keys, wrong types and missing values, named in the error."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinokit.config import registry


def validated(
    cls: type[Any], values: Mapping[str, Any], prefix: str, extra_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """All fields of the dataclass `cls`, from `values` and the defaults.

    Args:
        cls: the dataclass.
        values: some of its fields, as read from YAML.
        prefix: the key of the section that these values are from, for errors.
        extra_keys: further keys to list in the error for an unknown key.

    Raises:
        ValueError: for an unknown key, a missing value or a wrong type; it names the key.
    """
    _unknown_keys(cls, values, prefix, extra_keys)
    values = _with_lists(cls, values)
    try:
        given = OmegaConf.create(dict(values))
        merged = OmegaConf.merge(OmegaConf.structured(cls), given)
        # merge() replaces a missing value of `given` by the default, so both are searched.
        absent = sorted({str(key) for config in (given, merged) for key in OmegaConf.missing_keys(config)})
        if absent:
            keys = [join_key(prefix, key) for key in absent]
            raise ValueError(f"{' and '.join(keys)} must be given, as in {keys[0]}=VALUE.")
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key, near = _find_invalid(cls, values, prefix)
        if "is not a TupleConfig" in str(error):  # OmegaConf names its own class
            raise ValueError(f"{key}: it is a list and needs brackets: {key}=[...].") from None
        raise ValueError(f"{key}: {first_line(error)}.{near}") from None
    return {item.name: getattr(result, item.name) for item in fields(cls)}


def _with_lists(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with lists where the dataclass declares them: a,b and a alone are lists there as [a, b] is."""
    result = dict(values)
    for item in fields(cls):
        value, inner = result.get(item.name), _dataclass_of(item)
        if inner is not None and isinstance(value, Mapping):
            result[item.name] = _with_lists(inner, value)
        elif _is_list(item.type) and isinstance(value, str) and "," in value:
            result[item.name] = [_read(word) for word in value.split(",") if word.strip()]
        elif _is_list(item.type) and isinstance(value, str | int | float) and value != MISSING:
            result[item.name] = value if _has_fixed_length(item.type) else [value]
    return result


def _is_list(kind: object) -> bool:
    """Whether a type is a list or tuple, or that or None."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(map(_is_list, get_args(kind))) and not {str, int, float} & {*get_args(kind)}
    return get_origin(kind) in (list, tuple)


def _has_fixed_length(kind: object) -> bool:
    return get_origin(kind) is tuple and Ellipsis not in get_args(kind)


def _read(word: str) -> Any:
    """A word as YAML reads it, such as a number."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={word}"]))["value"]  # type: ignore[index, call-overload]


def keys_without_effect(
    cls: type[Any], values: Mapping[str, Any], prefix: str, extra_keys: Sequence[str] = ()
) -> dict[str, str]:
    """Keys of `values` that have no effect under the other settings, with the reason (registry.only_if).

    A key with its default value is not reported, because a run writes every default into its recipe.

    Raises:
        ValueError: as validated().
    """
    conditions = {f.name: f.metadata["only_if"] for f in fields(cls) if "only_if" in f.metadata}
    actual = validated(cls, values, prefix, extra_keys)
    default = validated(
        cls, {key: value for key, value in values.items() if key not in conditions}, prefix, extra_keys
    )
    reasons = {}
    for key in (key for key in values if key in conditions and actual[key] != default[key]):
        for other, condition in conditions[key].items():
            value = actual[other]
            if not (bool(value) is condition if isinstance(condition, bool) else value in condition):
                shown = value if isinstance(value, str) else json.dumps(value, default=list)
                but = (
                    f"here {join_key(prefix, other)}={shown}"
                    if value or value is False
                    else f"{join_key(prefix, other)} is not given"
                )
                reasons[key] = f"only {registry.condition_text(other, condition)}, and {but}"
                break
    return reasons


def _find_invalid(cls: type[Any], values: Mapping[str, Any], prefix: str) -> tuple[str, str]:
    """The key with the invalid value, which OmegaConf does not always name, and a suggestion."""
    for item in fields(cls):
        if item.name in values:
            key, value = join_key(prefix, item.name), values[item.name]
            try:
                OmegaConf.merge(OmegaConf.structured(cls), {item.name: value})
            except OmegaConfBaseException:
                inner = _dataclass_of(item)
                if inner and isinstance(value, Mapping):
                    return _find_invalid(inner, value, key)
                return key, registry.suggest(
                    str(value), _literals(item.type), cutoff=0.7
                )  # of short words, few are similar by accident
    return prefix, ""


def _literals(kind: object) -> list[str]:
    """The strings that a Literal type allows, also inside a union or tuple."""
    parts = getattr(kind, "__args__", ())
    return [word for part in parts for word in ([part] if isinstance(part, str) else _literals(part))]


def _unknown_keys(cls: type[Any], values: object, prefix: str, extra_keys: Sequence[str] = ()) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix}={values}: it is a section with the keys: {key_list(cls) or 'nothing'}.")
    known = {item.name: item for item in fields(cls)}
    for key, value in values.items():
        if key not in known:
            inside = f" in '{prefix}'" if prefix else ""
            near = registry.suggest(str(key), [*extra_keys, *known])
            have = ", ".join(filter(None, [*extra_keys, key_list(cls)]))
            raise ValueError(
                f"{join_key(prefix, str(key))}: there is no key '{key}'{inside}.{near} "
                f"There is: {have or 'nothing to set'}."
            )
        inner = _dataclass_of(known[key])
        if inner is not None and value is not None:
            _unknown_keys(inner, value, join_key(prefix, key))


def _dataclass_of(item: "Field[Any]") -> type[Any] | None:
    options = getattr(item.type, "__args__", (item.type,))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def key_list(cls: type[Any]) -> str:
    """The keys of a dataclass, for messages."""
    return ", ".join(f"{f.name}{' (must be given)' if _required(f) else ''}" for f in fields(cls))


def _required(item: "Field[Any]") -> bool:
    return item.default == MISSING or (item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT)


def join_key(prefix: str, key: str) -> str:
    """'section.key'; only one of them if the other is empty."""
    return f"{prefix}.{key}" if prefix and key else prefix or key


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
