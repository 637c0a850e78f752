"""Registries: from a name in a recipe to the module that implements it.

A registry is a package whose file names are the names that a recipe may use: `models`, `losses`,
`data.sources`, `eval`. An entry is a file that defines a dataclass `Config` and one function: `build`,
`evaluate` or `run`. Other files of the package are helpers. A dotted name is a module of another package, so
other packages can add entries without registering them.
"""

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import field
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# What an entry of a registry defines at its top level; its helpers define none of these.
ENTRY = re.compile(r"^(build = |def (build|evaluate|run)\()", re.MULTILINE)


def suggest(name: str, have: list[str], alike: float = 0.5) -> str:
    """' Did you mean 'x'?' with the nearest of `have`, or nothing if none is so much alike, of 1."""
    near = get_close_matches(name, have, n=1, cutoff=alike)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_at_least(config: Any, **least: float) -> None:
    """For __post_init__ of a Config: refuse a number, or one of several, that is too small.

    Raises:
        ValueError: naming the key.
    """
    for key, low in least.items():
        value = getattr(config, key)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number < low:
                raise ValueError(f"{key}={number}, but it must be {low} or more.")


def only_if(default: Any, **others: bool | tuple[str, ...]) -> Any:
    """A field of a Config that is read only if other fields are so; given without, it is refused.

    Args:
        default: of the field.
        others: by name the values of which one must be there, or whether anything must be.
    """
    return field(default=default, metadata={"only_if": others})


def source_field(kind: str, split: str, **more: bool) -> Any:
    """A field of an evaluator's Config that is a section of the registry `kind`; None by default.

    Inside a training run, a section that is not given is that split of the training data.

    Args:
        kind: data.sources, data.dense or data.videos.
        split: "train" or "test".
        more: optional=True for a section that may be missing, many=True for a mapping of sections by name,
            labels=False for images that need no labels.
    """
    return field(default=None, metadata={"registry": kind, "split": split, **more})


def condition_text(other: str, wanted: bool | tuple[str, ...]) -> str:
    """What only_if() was told of another field, in words: 'with method=knn', 'without head'."""
    if isinstance(wanted, bool):
        return f"{'with' if wanted else 'without'} {other}"
    return f"with {' or '.join(f'{other}={word}' for word in wanted)}"


def names(kind: str) -> list[str]:
    """The entries of a registry, sorted. Imports none of them."""
    return sorted(path.stem for path in _folder(kind).glob("*.py") if _is_entry(path))


def _is_entry(path: Path) -> bool:
    return not path.stem.startswith("_") and bool(ENTRY.search(path.read_text(encoding="utf-8")))


def find(kind: str, name: str) -> ModuleType:
    """The module behind a name: 'koleo' in the registry 'losses' is dinokit.losses.koleo.

    Raises:
        LookupError: if there is no such file; it lists what there is.
    """
    locate(kind, name)
    return import_module(name if "." in name else f"dinokit.{kind}.{name}")


def build(kind: str, section: Mapping[str, Any]) -> Any:
    """Make what a recipe's section describes: its `name` picks the file, the rest is that file's Config."""
    values = dict(section)
    module = find(kind, values.pop("name"))
    return module.build(module.Config(**values))


def recipe_names(kind: str = "") -> list[str]:
    """The recipes in configs/, sorted: for training, or of the kind that names begin with: eval, curate."""
    have = [
        p.name.removesuffix(".yaml") for p in files("dinokit.configs").iterdir() if p.name.endswith(".yaml")
    ]
    kinds = {name: name.partition("_")[0] if name.startswith(("eval_", "curate_")) else "" for name in have}
    return sorted(name for name in have if kinds[name] == kind)


def find_recipe(recipe: str | Path, kind: str = "") -> Path:
    """The file of a recipe: a name in configs/, or a path.

    Raises:
        LookupError: if there is none; it lists those in configs/.
    """
    return find_yaml("recipe", str(recipe), recipe_names(kind), files("dinokit.configs"))


def find_yaml(what: str, text: str, have: list[str], folder: Traversable) -> Path:
    """The file of a `what`: one of the names in `have`, which lie in `folder`, or a path.

    Raises:
        LookupError: if there is none; it lists `have`.
    """
    if text in have:
        return Path(str(folder / f"{text}.yaml"))
    if Path(text).is_file():
        return Path(text)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        raise LookupError(
            f"There is no {what} file '{text}' (looked from {Path.cwd()}). To copy one for a beginning, in "
            f"{folder} there is: {', '.join(have)}."
        )
    raise LookupError(
        f"There is no {what} '{text}'.{suggest(text, have)} {what.capitalize()}s are: "
        f"{', '.join(have)}; or give the path of a YAML file, such as a copy of one in {folder}."
    )


def read_config(kind: str, name: str) -> type[Any]:
    """The Config of a file, made without running the file.

    A recipe is checked before anything heavy is imported, so that a typo is answered at once. So only the
    file's imports of the standard library, of this module and of modules called `_config` (base classes of
    settings, which import nothing heavy), its plain constants, Config and the enums and dataclasses that
    Config names are executed here.

    Raises:
        LookupError: if there is no such file, or it defines no Config.
    """
    path = locate(kind, name)
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    wanted = _named_by_config(tree)
    tree.body = [
        node
        for node in tree.body
        if _is_plain(node) and (not isinstance(node, ast.ClassDef) or node.name in wanted)
    ]
    module = ModuleType(f"dinokit.config.registry.{kind}.{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    exec(compile(tree, str(path), "exec"), module.__dict__)
    if not hasattr(module, "Config"):
        raise LookupError(f"{path} defines no dataclass `Config`, so a recipe cannot use '{name}'.")
    return module.Config


def _named_by_config(tree: ast.Module) -> set[str]:
    """Config and the classes of the same file that it is written in terms of."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    done: set[str] = set()
    todo = {"Config"} & set(classes)
    while todo:
        name = todo.pop()
        done.add(name)
        words = {node.id for node in ast.walk(classes[name]) if isinstance(node, ast.Name)}
        todo |= (words & set(classes)) - done
    return done


def _is_plain(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        light = {*sys.stdlib_module_names, "omegaconf"}
        module = (node.module or "").split(".")
        return node.module == "dinokit.config.registry" or module[-1] == "_config" or module[0] in light
    if isinstance(node, ast.Import):
        return all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
    if isinstance(node, ast.ClassDef):
        parts = [n for part in (*node.bases, *node.decorator_list) for n in ast.walk(part)]
        words = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in parts}
        return bool(words & {"dataclass", "Enum", "StrEnum"})
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
        return True
    return False


def _folder(kind: str) -> Path:
    spec = find_spec(f"dinokit.{kind}")
    assert spec is not None, kind
    assert spec.submodule_search_locations, kind
    return Path(spec.submodule_search_locations[0])


def locate(kind: str, name: str) -> Path:
    """The file behind a name.

    Raises:
        LookupError: if there is none; it lists what there is.
    """
    if "." in name:
        try:
            spec = find_spec(name)
        except ModuleNotFoundError as error:
            raise LookupError(
                f"'{name}' (wanted for the registry '{kind}') cannot be imported: {error}."
            ) from None
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin)
    else:
        path = _folder(kind) / f"{name}.py"
        if path.is_file() and (_is_entry(path) or "\nclass Config" in path.read_text(encoding="utf-8")):
            return path
    have = names(kind)
    raise LookupError(
        f"'{name}' is not in the registry '{kind}', which has: {', '.join(have)}.{suggest(name, have)} "
        f"To add it, write {name.rpartition('.')[2]}.py there, or give a dotted path such as "
        f"my_package.my_module."
    )
