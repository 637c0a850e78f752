"""A copy of the code that a job will run, so that what is edited later does not reach it."""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from dinokit.config.load import run_dir_of

INSTALLED = {"site-packages", "dist-packages"}
APART = ("configs", "eval", "slurm")  # packages of dinokit that lie beside dinokit/ in a checkout


def copy_code(target: Path, names: Iterable[str] = ()) -> None:
    """Copy dinokit, as it is imported here, into a folder that PYTHONPATH can name.

    Args:
        target: the folder.
        names: dotted names that a recipe or command uses. The packages that they begin with are copied too,
            unless they are installed (not editable) or not there.
    """
    _copy(_place("dinokit"), target / "dinokit")
    for name in APART:
        place = _place(f"dinokit.{name}")
        if not (target / "dinokit" / name).exists():  # in a wheel they lie inside
            _copy(place, target / "dinokit" / name)
    for name in {name.split(".")[0] for name in names} - {"dinokit"} - sys.stdlib_module_names:
        own = _place(name)
        if own is not None and not INSTALLED & set(own.resolve().parts):
            _copy(own, target / own.name)


def copy_recipes(target: Path, commands: Sequence[Sequence[str]]) -> list[list[str]]:
    """Copy the YAML files that commands name into a folder. Returns the commands, naming the copies.

    The recipe.yaml of a run stays where it is: it means the run that it lies in.
    """
    copies: dict[str, str] = {}

    def copied(word: str) -> str:
        key, equals, path = word.rpartition("=")
        if not path.endswith((".yaml", ".yml")) or not Path(path).is_file() or run_dir_of(Path(path)):
            return word
        if path not in copies:
            copy = target / str(len(copies)) / Path(path).name  # its name is the recipe's
            copy.parent.mkdir(parents=True)
            copies[path] = str(shutil.copyfile(path, copy))
        return f"{key}{equals}{copies[path]}"

    return [[copied(word) for word in words] for words in commands]


def dotted(values: object) -> set[str]:
    """The modules, such as my_package.gram, that stand under `name` or as a key in nested settings."""
    if not isinstance(values, Mapping):
        return set()
    found = {str(x) for x in (*values, values.get("name")) if is_dotted(str(x))}
    return found.union(*(dotted(value) for value in values.values()))


def is_dotted(x: str) -> bool:
    """Whether a text can be the name of a module in a package."""
    return "." in x and all(part.isidentifier() for part in x.split("."))


def _place(name: str) -> Path | None:
    """The folder of a package, or the file of a module."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def _copy(place: Path | None, target: Path) -> None:
    assert place is not None, target
    if place.is_file():
        shutil.copy2(place, target)
    else:
        shutil.copytree(place, target, ignore=shutil.ignore_patterns("__pycache__"))
