"""Validates values against a dataclass: unknown keys, wrong types and missing values, named in the error."""

import json
import types
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, asdict, fields, is_dataclass
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinokit.config import registry

DEEPEST = 100  # levels of YAML
LOSS_FIELDS = {"phase": "phase: tuple[float, float] = (0.0, 1.0)", "ramp": "ramp: int = 0"}
SOURCE_OF_SUFFIX = {
    ".parquet": "parquet", ".tar": "tar", ".txt": "manifest", ".csv": "manifest"
}  # fmt: skip
DEFAULT_SOURCE = {
    "data.dense": "folders", "data.videos": "davis", "data.objects": "sa1b", "data.captions": "folder",
    "data.pairs": "spair", "data.clips": "folders",
}  # fmt: skip


def source_of(path: str) -> str:
    """The source of images that reads a path: by its suffix, else a folder."""
    return SOURCE_OF_SUFFIX.get(Path(path).suffix.lower(), "folder")


def with_source(section: Mapping[str, Any], kind: str = "data.sources") -> dict[str, Any]:
    """The section of a source, with a name if it has none: for images, of the source that reads its path."""
    return {"name": DEFAULT_SOURCE.get(kind) or source_of(str(section.get("path", ""))), **section}


def validated(
    cls: type[Any], values: Mapping[str, Any], prefix: str, extra_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """All fields of the dataclass `cls`, from `values` and the defaults, with the types that it declares.

    Args:
        cls: the dataclass. Its fields are int, float, str, bool, Path, Literal, Enum, lists, tuples, dicts,
            other dataclasses, Any, or one of these or None; fields of other types are not checked.
        values: some of its fields, as read from YAML.
        prefix: the key of the section that these values are from, for errors.
        extra_keys: further keys to list in the error for an unknown key.

    Raises:
        ValueError: for an unknown key, a missing value or a wrong type; it names the key.
    """
    _unknown_keys(cls, values, prefix, extra_keys)
    try:
        merged = OmegaConf.create(_over(_defaults(cls), values))
        plain: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = join_key(prefix, str(error.full_key or ""))
        raise ValueError(f"{key or 'The values'}: {first_line(error)}.") from None
    given = _fields(cls, plain, prefix)
    _refuse_absent(OmegaConf.missing_keys(merged), prefix)
    result = cls(**given)
    return {item.name: getattr(result, item.name) for item in fields(cls)}


def _refuse_absent(absent: Collection[Any], prefix: str) -> None:
    if absent:
        keys = [join_key(prefix, key) for key in sorted(map(str, absent))]
        listed = " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
        raise ValueError(f"{listed} must be given, as in {keys[0]}=VALUE.")


def _defaults(cls: type[Any]) -> dict[str, Any]:
    """The defaults of a dataclass as plain values; MISSING where there is none."""
    values: dict[str, Any] = {}
    for item in fields(cls):
        default: Any = item.default if item.default_factory is NO_DEFAULT else item.default_factory()
        if is_dataclass(default) and not isinstance(default, type):
            default = asdict(default)
        values[item.name] = MISSING if default is NO_DEFAULT else default
    return values


def _over(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`, inside of sections too."""
    result = {**defaults, **values}
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            result[key] = _over(defaults[key], value)
    return result


def _fields(cls: type[Any], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    kinds = get_type_hints(cls)
    names = [item.name for item in fields(cls) if item.name in values]
    return {name: _converted(kinds[name], values[name], join_key(prefix, name)) for name in names}


def _converted(kind: Any, value: Any, key: str) -> Any:
    """`value`, as YAML reads it, as a value of the type `kind`; a number or word alone is a list too.

    Raises:
        ValueError: if it is none; it begins with `key`.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inside:
            return None
        options = [each for each in inside if each is not types.NoneType]
        return _first_that_fits(options, value, key)
    if value == MISSING:
        return value
    if value is None and (kind in WORDS or origin is not None or is_dataclass(kind)):
        raise ValueError(f"{key}: it cannot be null.")
    if origin is Literal:
        return _literal(inside, value, key)
    if isinstance(kind, EnumType):
        return value if isinstance(value, kind) else kind[_literal([*kind.__members__], value, key)]
    if origin in (list, tuple):
        return _list(origin, inside, value, key)
    if isinstance(kind, type) and is_dataclass(kind):
        _unknown_keys(kind, value, key)
        given = _fields(kind, _over(_defaults(kind), value), key)
        _refuse_absent([name for name, each in given.items() if each == MISSING], key)
        return kind(**given)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value}: it is a section, as in {key}.KEY=VALUE.")
        return {name: _converted(inside[1], each, join_key(key, str(name))) for name, each in value.items()}
    return _plain(kind, value, key) if kind in WORDS else value


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", Path: "a path"}
YES, NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def _plain(kind: Any, value: Any, key: str) -> Any:
    text = str(value).strip().lower()
    fits = isinstance(value, str | int | float) or (kind in (str, Path) and isinstance(value, Path))
    if isinstance(value, bool) and kind not in (bool, str):
        fits = False  # to Python true is the number 1
    if kind is bool and text in YES | NO:
        return text in YES
    with suppress(ValueError):
        if fits and kind is not bool and not (kind is int and isinstance(value, float)):
            return kind(str(value) if kind in (str, Path) else value)
    raise ValueError(f"{key}: {_shown(value)} is not {WORDS[kind]}.")


def _literal(allowed: Sequence[Any], value: Any, key: str) -> Any:
    # YAML reads a word as a number if it can, and yes and no, on and off as booleans.
    texts = (YES if value else NO) if isinstance(value, bool) else {str(value)}
    for word in allowed:
        if word is value or (str(word) in texts and not (isinstance(value, bool) and type(word) is int)):
            return word
    # Of short words, few are similar by accident.
    near = registry.suggest(str(value), [str(word) for word in allowed], cutoff=0.7)
    raise ValueError(f"{key}: {_shown(value)} is not one of {', '.join(map(str, allowed))}.{near}")


def _list(origin: Any, inside: Sequence[Any], value: Any, key: str) -> Any:
    length = len(inside) if origin is tuple and Ellipsis not in inside else None
    if isinstance(value, str) and "," in value:
        value = [_read(word) for word in value.split(",") if word.strip()]
    elif isinstance(value, str | int | float) and length is None:
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}: it is a list and needs brackets: {key}=[...].")
    if length is not None and len(value) != length:
        raise ValueError(f"{key}={json.dumps(value)}: it needs {length} values, not {len(value)}.")
    kinds = inside if length is not None else [inside[0] if inside else Any] * len(value)
    return origin(_converted(kind, each, key) for kind, each in zip(kinds, value, strict=True))


def _first_that_fits(options: Sequence[Any], value: Any, key: str) -> Any:
    """The value as the one of several types that it has already, or else as the first that it can be."""
    same = [each for each in options if each is type(value) or get_origin(each) is type(value)]
    failed: list[ValueError] = []
    for option in [*same, *options]:
        try:
            return _converted(option, value, key)
        except ValueError as error:
            failed.append(error)
    raise failed[-1]


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)


def _read(word: str) -> Any:
    """A word as YAML reads it, such as a number."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={word}"]))["value"]  # type: ignore[index, call-overload]


def keys_without_effect(
    cls: type[Any], values: Mapping[str, Any], prefix: str, extra_keys: Sequence[str] = ()
) -> dict[str, str]:
    """Keys of `values` that have no effect under the other settings, with the reason (registry.only_if).

    A key with its default value is not reported, because a run writes every default into its recipe.

    Raises:
        ValueError: as validated(), if there is a key that can be without effect.
    """
    conditions = {f.name: f.metadata["only_if"] for f in fields(cls) if "only_if" in f.metadata}
    if not conditions.keys() & set(values):
        return {}
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


def refuse_without_effect(
    cls: type[Any], values: Mapping[str, Any], prefix: str, extra_keys: Sequence[str] = ()
) -> None:
    """Raises ValueError if some of `values` have no effect; it names them with the reason."""
    keys: dict[str, list[str]] = {}
    for key, reason in keys_without_effect(cls, values, prefix, extra_keys).items():
        keys.setdefault(reason, []).append(join_key(prefix, key))
    if keys:
        listed = "; ".join(f"{', '.join(some)}: {reason}" for reason, some in keys.items())
        raise ValueError(f"{listed}. Remove the keys that have no effect, or change the settings they need.")


def _unknown_keys(cls: type[Any], values: object, prefix: str, extra_keys: Sequence[str] = ()) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix}={values}: it is a section with the keys: {key_list(cls) or 'nothing'}.")
    known = [item.name for item in fields(cls)]
    for key in values:
        if key not in known:
            inside = f" in '{prefix}'" if prefix else ""
            near = _in_section(cls, str(key)) or _optional(prefix, str(key))
            near = near or registry.suggest(str(key), [*extra_keys, *known])
            more = [each for each in extra_keys if each not in known]
            have = ", ".join(filter(None, [*more, key_list(cls)]))
            raise ValueError(
                f"{join_key(prefix, str(key))}: there is no key '{key}'{inside}.{near} "
                f"There is: {have or 'nothing to set'}."
            )


def _optional(prefix: str, key: str) -> str:
    """How a loss of another package gets a key that it may have (docs/extend.md)."""
    if key not in LOSS_FIELDS or not prefix.startswith("losses.") or prefix.count(".") < 2:
        return ""
    return f" For it, add the field `{LOSS_FIELDS[key]}` to the Config of {prefix.partition('.')[2]}."


def _in_section(cls: type[Any], key: str) -> str:
    """Did you mean the key of this name in a section?"""
    for name, kind in get_type_hints(cls).items():
        if isinstance(kind, type) and is_dataclass(kind) and key in {item.name for item in fields(kind)}:
            return f" Did you mean '{name}.{key}'?"
    return ""


def _reset_by(override: str) -> str:
    """The key that an override sets to null or {}; empty if it sets a value."""
    key, _, value = override.partition("=")
    return key if value.replace(" ", "").lower() in ("", "~", "null", "{}") else ""


def in_force(overrides: Sequence[str]) -> list[str]:
    """`overrides` without those of keys in a section that a later one resets."""
    left: list[str] = []
    for text in overrides:
        if key := _reset_by(text):
            left = [each for each in left if not each.startswith(f"{key}.")]
        left.append(text)
    return left


def forget_reset(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Empty in `values` what an override resets: `losses=null losses.dino.weight=1` keeps no other loss."""
    for path in filter(None, map(_reset_by, overrides)):
        key = path
        section: Any = values
        while isinstance(section, dict) and key not in section and "." in key:
            first, _, key = key.partition(".")  # a name of a module has dots and stays whole
            section = section.get(first)
        if isinstance(section, dict) and key in section:
            section[key] = None


def key_list(cls: type[Any]) -> str:
    """The keys of a dataclass, for messages."""
    return ", ".join(f"{f.name}{' (must be given)' if _required(f) else ''}" for f in fields(cls))


def _required(item: "Field[Any]") -> bool:
    return item.default == MISSING or (item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT)


def join_key(prefix: str, key: str) -> str:
    """'section.key'; only one of them if the other is empty."""
    return f"{prefix}.{key}" if prefix and key else prefix or key


def read_yaml(text: str) -> Any:
    """YAML as plain values, with ${...} as it stands.

    Raises:
        Exception: those of OmegaConf and its YAML reader have no common base class.
        ValueError: for YAML so deep that its reader, which is recursive, would end the process.
    """
    steps = depth = 0
    for character in text:
        steps += (character in "[{") - (character in "]}")
        depth = max(depth, steps)
    indent = max((len(line) - len(line.lstrip(" -?")) for line in text.splitlines()), default=0)
    if depth > DEEPEST or indent > 4 * DEEPEST:
        raise ValueError("it is nested too deeply")
    return OmegaConf.to_container(OmegaConf.create(text))


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
