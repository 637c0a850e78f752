"""What README and docs name in their text is what there is: files, tests, commands, targets, extras, keys."""

import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest

from dinokit.commands import read_command
from dinokit.config import registry
from dinokit.config.recipe import WEIGHT_KEYS, Recipe
from dinokit.language.align_recipe import Config as AlignRecipe
from dinokit.language.recipe import Config as InstructRecipe
from dinokit.segment.recipe import Config as HeadRecipe

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TOPS = ("dinokit", "eval", "slurm", "configs", "tests", "docs", "notebooks", ".github", ".ci")
PLACEHOLDER = r"\b[A-Z][A-Z_]+\b"  # NAME, RUN ...
OWN_PACKAGE = ("my_package/", "my_recipe")  # of docs/extend.md
REGISTRIES = {"backbone": "models", "data": "data.sources", "losses": "losses", "evals": "eval"}


def inline(page: Path) -> list[str]:
    """Texts in backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [found for found in re.findall(r"`([^`\n]+)`", text) if not found.startswith(OWN_PACKAGE)]


SOURCES = {path.name for top in TOPS for path in (ROOT / top).rglob("*.py")}


def missing_file(name: str) -> bool:
    """Whether `name` is a file or test of the project, and is not there."""
    file, _, test = name.partition("::")
    if re.search(PLACEHOLDER, file) or not re.fullmatch(r"[\w./*-]+", file):
        return False
    if "/" not in file:
        return file.endswith(".py") and file not in SOURCES
    if file.split("/")[0] not in TOPS:
        return (
            not file.startswith("runs/") and file.endswith(".py") and not (ROOT / "dinokit" / file).exists()
        )
    found = sorted(ROOT.glob(file.rstrip("/"))) or sorted((ROOT / "dinokit").glob(file))
    return not found or (bool(test) and f"def {test}(" not in found[0].read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_tests_of_a_page_exist(page):
    names = [
        *inline(page),
        *(n for text in inline(page) for n in re.findall(r"\S+/\S+\.(?:py|md|yaml)\b", text)),
    ]
    tests = {}
    for match in re.finditer(
        r"`(tests/[\w/]+\.py)(?:::\w+)?`((?:, `::\w+`)*)", page.read_text(encoding="utf-8")
    ):
        tests |= dict.fromkeys(f"{match[1]}{short}" for short in re.findall(r"::\w+", match[2]))
    assert not sorted({name for name in [*names, *tests] if missing_file(name)})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_targets_in_the_text_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for text in inline(page):
        words = shlex.split(text) if text.startswith("dinokit ") else text.split()
        if words[:1] == ["make"] and len(words) == 2:
            assert words[1] in targets, text
        if words[:1] != ["dinokit"] or words[1:2] in ([], ["COMMAND"]) or words[1].startswith("-"):
            continue
        words = words[2:] if words[1] == "help" else words[1:]
        if words[0] != "COMMAND":
            read_command(words[0], words[1:])


EXTRA = r"(?:'\.|dinokit)\[([\w,]+)\]|\bextras? `([\w]+)`"


def test_extras_that_pages_and_messages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    have = {*extras["optional-dependencies"]}
    code = [path for top in ("dinokit", "eval", "slurm") for path in (ROOT / top).rglob("*.py")]
    others = [ROOT / "Dockerfile", ROOT / "apptainer.def"]
    named = {
        name: path.name
        for path in [*PAGES, *code, *others]
        for match in re.finditer(EXTRA, path.read_text(encoding="utf-8"))
        for name in (match[1] or match[2]).split(",")
    }
    assert len(named) > 5
    assert not {name: where for name, where in named.items() if name not in have}


def known(parts: list[str], cls: type) -> bool:
    """Whether a dotted key is one of a dataclass."""
    item = next((item for item in fields(cls) if item.name == parts[0]), None)
    if item is None or len(parts) == 1:
        return item is not None
    inner = [
        kind for kind in (item.type, *get_args(item.type)) if isinstance(kind, type) and is_dataclass(kind)
    ]
    return known(parts[1:], inner[0]) if inner else True


def is_key(key: str) -> bool:
    """Whether there is such a key of a recipe, of any model, source, loss and evaluator."""
    section, *parts = key.split(".")
    if section not in REGISTRIES:
        return known([section, *parts], Recipe)
    kind, names = REGISTRIES[section], registry.names(REGISTRIES[section])
    if section in ("losses", "evals"):
        name, *parts = parts
        if name not in names or not parts:
            return name in names
        return parts[0] == "every" or known(parts, registry.read_config(kind, name))
    extra = {"name", *(WEIGHT_KEYS if section == "backbone" else ())}
    return parts[0] in extra or any(known(parts, registry.read_config(kind, name)) for name in names)


SECTIONS = [item.name for item in fields(Recipe) if item.name != "name"]


OTHER_RECIPES = {
    "segment.md": (HeadRecipe,),
    "language.md": (AlignRecipe, InstructRecipe),
}  # of commands beside train


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_keys_of_a_recipe_in_the_text_exist(page):
    pattern = rf"(?<![\w./])(?:{'|'.join(SECTIONS)})(?:\.[a-z_]\w*)+"
    texts = [text for text in inline(page) if "/" not in text.partition("=")[0]]
    keys = {key for text in texts for key in re.findall(pattern, text) if not key.endswith(FILES)}
    recipes = OTHER_RECIPES.get(page.name, ())
    of_others = {key for key in keys if any(known(key.split("."), recipe) for recipe in recipes)}
    kinds = {
        "data.objects",
        "data.sources",
        "data.dense",
        "data.videos",
        "data.pairs",
        "data.clips",
        "data.captions",
        "data.talks",
    }
    python = {"backbone.input", "backbone.licence", "backbone.bfloat16"}  # attributes and methods
    assert not sorted(key for key in keys - of_others - kinds - python if not is_key(key))


FILES = (".jsonl", ".yaml", ".json", ".log", ".py", ".html", ".safetensors", ".md", ".parquet")


def test_the_readers_above_see_what_is_not_there():
    assert missing_file("tests/docs/test_names.py::test_that_is_not_there")
    assert missing_file("dinokit/nothing.py")
    assert missing_file("nothing.py")
    assert not missing_file("dinokit/config/load.py")
    assert not missing_file("configs/eval_*.yaml")
    assert not is_key("run.max_unreadible")
    assert not is_key("evals.knn.neighbours")
    assert is_key("evals.knn.train.path")
    assert is_key("crops.locals.count")
    assert is_key("backbone.stem")
