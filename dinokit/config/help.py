"""Lists the keys of a registry entry for --help: the fields of its Config with their comments."""

import ast
import json
import sys
import tokenize
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, get_args, get_origin

from dinokit.config import registry

WIDTH, COLUMN = 110, 32  # characters in a line; column of the meaning


def key_lines(kind: str, name: str, without: Collection[str] = ()) -> list[str]:
    """Lines for each key of an entry but those in `without`. The file is not imported.

    Raises:
        LookupError: if there is no such file, or it defines no Config.
    """
    texts = comments(kind, name)
    known = [f for f in fields(registry.read_config(kind, name)) if f.name not in without]
    return [key_line(_default(f), _meaning(f, texts[f.name])) for f in known]


def key_line(key: str, meaning: str) -> str:
    """`key = default` and its meaning: beside it, or below it if the key is long."""
    left = f"    {key}"
    beside = len(left) < COLUMN - 1
    if not meaning:
        return left
    text = fill(meaning, WIDTH, initial_indent=" " * COLUMN, subsequent_indent=" " * COLUMN)
    return f"{left}{text[len(left) :]}" if beside else f"{left}\n{text}"


def comments(kind: str, name: str) -> dict[str, str]:
    """The comment of each field of a file's Config and its base classes: beside it, or on lines above it."""
    result: dict[str, str] = {}
    for cls in reversed(registry.read_config(kind, name).__mro__):
        if is_dataclass(cls):
            result |= _class_comments(Path(sys.modules[cls.__module__].__file__ or ""), cls.__name__)
    return result


def _class_comments(path: Path, class_name: str) -> dict[str, str]:
    with path.open("rb") as file:
        words = list(tokenize.tokenize(file.readline))
    beside = {w.start[0]: w.string.lstrip("# ") for w in words if w.type == tokenize.COMMENT}
    alone = {w.start[0] for w in words if w.type == tokenize.COMMENT and not w.line[: w.start[1]].strip()}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    result = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            result[node.target.id] = " ".join(beside[line] for line in lines if line in beside)
    return result


def _default(item: "Field[Any]") -> str:
    if item.default_factory is not MISSING:
        return item.name
    if item.default in (MISSING, "???"):
        return f"{item.name} (must be given)"
    return item.name if item.default is None else f"{item.name} = {json.dumps(item.default, default=list)}"


def _meaning(item: "Field[Any]", comment: str) -> str:
    options = get_args(item.type) if get_origin(item.type) is Literal else ()
    if "registry" in item.metadata:
        have = ", ".join(registry.names(item.metadata["registry"]))
        inside = f"{item.name}.NAME" if "many" in item.metadata else item.name
        options = (f"a section: {inside}.path=..., {inside}.name= one of {have}, and its keys",)
        return ". ".join(filter(None, [options[0], comment]))
    conditions = [registry.condition_text(*pair) for pair in item.metadata.get("only_if", {}).items()]
    when = f"only {' and '.join(conditions)}" if conditions else ""
    return "; ".join(filter(None, [", ".join(map(str, options)), comment, when]))
