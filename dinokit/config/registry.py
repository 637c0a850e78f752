"""Registries: from a name in a recipe to the module that implements it.

A registry is a package whose file names are the names that a recipe may use: `models`, `losses`,
`data.sources`, `eval`. An entry is a file that defines a dataclass `Config` and one function: `build`,
`evaluate` or `run`. Other files of the package are helpers. A dotted name is a module of another package, so
other packages can add entries without registering them.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, field, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# What an entry of a registry defines at its top level; its helpers define none of these.
ENTRY = re.compile(r"^(build = |def (build|evaluate|run)\()", re.MULTILINE)
# What the names of recipes begin with that train no backbone.
KINDS = ("eval_", "curate_", "head_", "align_", "instruct_")
# What objects of a registry must have, which training and evaluation use; of other packages they may not.
_SOURCE = ("__len__", "__getitem__", "name", "classes")
ATTRIBUTES = {
    "models": ("width", "patch", "channels", "blocks"),
    **dict.fromkeys(("data.sources", "data.dense", "data.objects"), _SOURCE),
}
_trusted: set[str] = set()  # packages that a recipe or command of the user names, or that trust() does


def suggest(name: str, available: list[str], cutoff: float = 0.5) -> str:
    """The sentence "Did you mean 'x'?", or an empty string if nothing in `available` is similar."""
    near = get_close_matches(name, available, n=1, cutoff=cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_at_least(config: Any, **least: float) -> None:
    """For __post_init__ of a Config: check that numbers, or all numbers in a list, are large enough.

    Raises:
        ValueError: if one is too small; it names the key.
    """
    for key, low in least.items():
        value = getattr(config, key)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number < low:
                raise ValueError(f"{key}={number}, but it must be {low} or more.")


def only_if(default: Any, **others: bool | tuple[str, ...]) -> Any:
    """A field of a Config that has an effect only with some values of other fields; else it is refused.

    Args:
        default: of the field.
        others: by name of the other field: its allowed values, or whether it must be set.
    """
    return field(default=default, metadata={"only_if": others})


def source_field(kind: str, split: str, **more: Any) -> Any:
    """A field of an evaluator's Config that is a section of the registry `kind`; None by default.

    Inside a training run, a section that is not given is that split of the training data.

    Args:
        kind: data.sources, data.dense, data.objects, data.pairs, data.videos or data.clips.
        split: "train" or "test".
        more: optional=True for a section that may be missing, many=True for a mapping of sections by name,
            labels=False for images that need no labels, only_if={...} as only_if() takes it.
    """
    return field(default=None, metadata={"registry": kind, "split": split, **more})


def is_used(item: "Field[Any]", values: Mapping[str, Any]) -> bool:
    """Whether a field of a Config has an effect beside the other `values`, as only_if() says."""
    for other, condition in item.metadata.get("only_if", {}).items():
        if other in values:
            value = values[other]
            if not (bool(value) is condition if isinstance(condition, bool) else value in condition):
                return False
    return True


def condition_text(other: str, condition: bool | tuple[str, ...]) -> str:
    """A condition of only_if() as text: 'with method=knn', 'without head'."""
    if isinstance(condition, bool):
        return f"{'with' if condition else 'without'} {other}"
    return f"with {other}={' or '.join(condition)}"


def trust(*packages: str) -> None:
    """Allow files of weights and stores to name modules of these packages."""
    _trusted.update(packages)


def trusted() -> set[str]:
    """The packages that the user has named."""
    return set(_trusted)


def check_from_file(values: object, path: str | Path, what: str) -> None:
    """Refuse settings out of a file that would run code, read the environment, or download anything.

    Args:
        values: a section, or several; every `name` in it is checked.
        path: of the file.
        what: the user can give in its place, for the error.

    Raises:
        ValueError: for a dotted name, unless the user has named its package; for ${...}; and for a data set
            that would be downloaded.
    """
    for section in _sections(values):
        place = str(section.get("path") or "")
        hub = section.get("name") == "hf" and not Path(place).expanduser().is_dir()
        if section.get("download") or (hub and place.partition("/")[0] not in _trusted):
            raise ValueError(
                f"{path} names the images '{place}', which would be downloaded: give {what} yourself."
                + (f" Or, if you trust them, give --trust={place.partition('/')[0]}." if hub else "")
            )
        if section.get("pretrained"):
            raise ValueError(f"{path} names a model whose weights would be downloaded: give {what} yourself.")
    for key, text in texts(values):
        package = text.partition(".")[0]
        if key == "name" and "." in text and package not in _trusted:
            raise ValueError(
                f"{path} names the module '{text}', and importing it would run its code. If you trust "
                f"{package}, give --trust={package}, or in Python dinokit.config.registry.trust('{package}')."
            )
        if "${" in text:
            raise ValueError(
                f"{path} has {key}={text}, which is not resolved out of a file: give {what} yourself."
            )


def _sections(values: object) -> Iterator[Mapping[str, Any]]:
    """Every section in nested settings."""
    if isinstance(values, Mapping):
        yield values
        values = list(values.values())
    if isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from _sections(value)


def texts(values: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with the nearest key."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from texts(value, str(name))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from texts(value, key)
    elif isinstance(values, str):
        yield key, values


def names(kind: str) -> list[str]:
    """The entries of a registry, sorted. Imports none of them. Names of commands have dashes."""
    found = sorted(path.stem for path in _folder(kind).glob("*.py") if _is_entry(path))
    return [name.replace("_", "-") for name in found] if kind == "commands" else found


def _is_entry(path: Path) -> bool:
    return not path.stem.startswith("_") and bool(ENTRY.search(path.read_text(encoding="utf-8")))


def find(kind: str, name: str) -> ModuleType:
    """The module behind a name: 'koleo' in the registry 'losses' is dinokit.losses.koleo.

    Raises:
        LookupError: if there is none; it lists the entries.
    """
    locate(kind, name)
    return import_module(name if "." in name else f"dinokit.{kind}.{name.replace('-', '_')}")


def build(kind: str, section: Mapping[str, Any]) -> Any:
    """Build the object of a recipe's section: `name` is the entry, the other keys are its Config.

    Raises:
        LookupError: if there is no such entry.
        ValueError: if what it builds lacks an attribute in ATTRIBUTES.
    """
    values = dict(section)
    module = find(kind, name := values.pop("name"))
    made = module.build(module.Config(**values))
    if missing := [each for each in ATTRIBUTES.get(kind, ()) if not hasattr(made, each)]:
        raise ValueError(
            f"{name} builds a {type(made).__name__} without {', '.join(missing)}: an entry of '{kind}' has "
            f"{', '.join(ATTRIBUTES[kind])}."
        )
    return made


def recipe_names(kind: str = "") -> list[str]:
    """The recipes in configs/, sorted: for training, or those of a `kind`, such as eval."""
    have = [
        p.name.removesuffix(".yaml") for p in files("dinokit.configs").iterdir() if p.name.endswith(".yaml")
    ]
    kinds = {name: name.partition("_")[0] if name.startswith(KINDS) else "" for name in have}
    return sorted(name for name in have if kinds[name] == kind)


def find_recipe(recipe: str | Path, kind: str = "") -> Path:
    """The file of a recipe: a name in configs/, or a path.

    Raises:
        LookupError: if there is none; it lists those in configs/.
    """
    return find_yaml("recipe", str(recipe), recipe_names(kind), files("dinokit.configs"))


def find_yaml(what: str, text: str, have: list[str], folder: Traversable) -> Path:
    """The YAML file of a `what`, given as a path or as one of the names `have` in `folder`.

    Raises:
        LookupError: if there is none; it lists `have`.
    """
    if text in have:
        return Path(str(folder / f"{text}.yaml"))
    if Path(text).is_file():
        return Path(text)
    if what == "recipe" and Path(text).is_dir():
        inside = Path(text) / "recipe.yaml"
        way = f"The {what} of a run is {inside}" if inside.is_file() else f"Images are data.path={text}"
        raise LookupError(f"{text} is a folder, not a {what}. {way}.")
    if text.endswith((".yaml", ".yml")) or "/" in text:
        near = suggest(Path(text).name, [path.name for path in Path(text).parent.glob("*.y*ml")])
        raise LookupError(
            f"There is no {what} file '{text}' (looked from {Path.cwd()}).{near} You can copy one from "
            f"{folder}: {', '.join(have)}."
        )
    raise LookupError(
        f"There is no {what} '{text}'.{suggest(text, have)} {what.capitalize()}s are: "
        f"{', '.join(have)}; or give the path of a YAML file, such as a copy of one in {folder}."
    )


def read_config(kind: str, name: str) -> type[Any]:
    """The Config of a file: that of a module of another package, which is imported, or one of dinokit's.

    A recipe is checked before anything heavy is imported, so that a typo is answered at once: a file of
    dinokit is not imported for its Config.

    Raises:
        LookupError: if there is no such file, or it defines no Config, or not the function of its registry.
        Exception: whatever the import of a module of another package raises.
    """
    path = locate(kind, name)
    if "." not in name:
        return _config_in(path, f"{__name__}.{kind}.{name}")
    module = import_module(name)
    if not hasattr(module, _function(kind)):
        raise LookupError(
            f"'{name}' is no entry of the registry '{kind}': {path} defines no function `{_function(kind)}`."
        )
    if is_dataclass(getattr(module, "Config", None)):
        return module.Config
    raise LookupError(f"{path} defines no dataclass `Config`, so a recipe cannot use '{name}'.")


@lru_cache(maxsize=256)
def _config_in(path: Path, as_module: str) -> type[Any]:
    """The Config of a file of dinokit, in a module that has only what is light in the file.

    These are its imports of the standard library, of this module, of dinokit.eval and of modules called
    `_config` (base classes of settings), its constants, Config, and the enums and dataclasses that it names.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    used = _used_by_config(tree)
    tree.body = [
        node
        for node in tree.body
        if _is_plain(node) and (not isinstance(node, ast.ClassDef) or node.name in used)
    ]
    module = ModuleType(as_module)
    module.__file__ = str(path)
    sys.modules[as_module] = module  # dataclasses look their module up by name
    exec(compile(tree, str(path), "exec"), module.__dict__)
    if not hasattr(module, "Config"):
        raise LookupError(f"{path} defines no dataclass `Config`, so a recipe cannot use it.")
    config: type[Any] = module.Config
    return config


def _function(kind: str) -> str:
    return "evaluate" if kind == "eval" else "build"


def _used_by_config(tree: ast.Module) -> set[str]:
    """Config and the classes of the same file that it uses."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    used: set[str] = set()
    todo = {"Config"} & set(classes)
    while todo:
        name = todo.pop()
        used.add(name)
        words = {node.id for node in ast.walk(classes[name]) if isinstance(node, ast.Name)}
        todo |= (words & set(classes)) - used
    return used


def _is_plain(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        light = {*sys.stdlib_module_names, "omegaconf"}
        module = (node.module or "").split(".")
        ours = ("dinokit.config.registry", "dinokit.eval")
        return node.module in ours or module[-1] == "_config" or module[0] in light
    if isinstance(node, ast.Import):
        return all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
    if isinstance(node, ast.ClassDef):
        nodes = [n for head in (*node.bases, *node.decorator_list) for n in ast.walk(head)]
        words = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in nodes}
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


def modules(package: str) -> list[str]:
    """The names of the modules in a package that is not imported for it; none if there is no such package."""
    with suppress(ModuleNotFoundError, ValueError):
        spec = find_spec(package)
        places = (spec and spec.submodule_search_locations) or ()
        return sorted(path.stem for place in places for path in Path(place).glob("[!_]*.py"))
    return []


def locate(kind: str, name: str) -> Path:
    """The file behind a name.

    Raises:
        LookupError: if there is none; it lists the entries.
    """
    if "." in name:
        trust(name.partition(".")[0])  # files were checked before
        try:
            spec = find_spec(name)
        except ModuleNotFoundError as error:
            near = _own_modules(kind, name) or (
                f" It would be the file {name.replace('.', '/')}.py in {Path.cwd()}, or a module of an "
                f"installed package."
            )
            raise LookupError(
                f"'{name}' (for the registry '{kind}') cannot be imported: {error}.{near}"
            ) from None
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin)
        package, _, module = name.rpartition(".")
        if have := modules(package):
            raise LookupError(
                f"There is no '{module}' in {package}, which has: {', '.join(have)}.{suggest(module, have)}"
            )
    else:
        path = _folder(kind) / f"{name.replace('-', '_')}.py"
        if path.is_file() and (_is_entry(path) or "\nclass Config" in path.read_text(encoding="utf-8")):
            return path
    have = names(kind)
    raise LookupError(
        f"'{name}' is not in the registry '{kind}', which has: {', '.join(have)}."
        f"{_own_modules(kind, name) or suggest(name, have)} "
        f"A module of a package in this folder, or of an installed one, is named in full: "
        f"my_package.my_module."
    )


def _own_modules(kind: str, name: str) -> str:
    """Did you mean a module in the working folder: my_package.spread for spread, any for my_package?"""
    last = re.split(r"[./]", name.removesuffix(".py"))[-1]
    entry = re.compile(rf"^(def )?{_function(kind)}( = |\()", re.MULTILINE)
    found = sorted(
        f"'{path.parent.name}.{path.stem}'"
        for path in Path.cwd().glob("*/[!_]*.py")
        if last in (path.stem, path.parent.name) and entry.search(path.read_text("utf-8", "replace"))
    )
    return f" Did you mean {' or '.join(found)}?" if found else ""
