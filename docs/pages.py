"""Gather the pages of the documentation site in build/pages, for zensical.toml: `make docs`.

Most pages are files of docs/ as they are. Made here: the front page out of README.md, the reference of all
keys out of the recipe's dataclasses and the registries, the reference of the Python modules for mkdocstrings.
Links to files that are no pages become plain text, because the site has no source code.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dinokit.commands import config_keys
from dinokit.config import registry
from dinokit.config.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build/pages"
PROJECT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
REGISTRIES = {
    "models": ("Backbones", "backbone.name=NAME backbone.KEY=VALUE"),
    "losses": ("Losses", "losses.NAME.KEY=VALUE"),
    "data.sources": ("Sources of images", "data.name=NAME data.KEY=VALUE"),
    "data.dense": ("Sources of images with maps", "train.name=NAME train.KEY=VALUE"),
    "data.objects": ("Sources of images with masks of objects", "test.name=NAME test.KEY=VALUE"),
    "data.captions": ("Sources of images with captions", "data.name=NAME data.KEY=VALUE, or test.name=NAME"),
    "data.videos": ("Sources of videos", "test.name=NAME test.KEY=VALUE"),
    "data.pairs": ("Sources of pairs of images with points", "test.name=NAME test.KEY=VALUE"),
    "data.clips": ("Sources of clips with classes", "test.name=NAME test.KEY=VALUE"),
    "data.talks": ("Talks about images", "data.name=NAME data.KEY=VALUE, of dinokit instruct"),
    "eval": ("Evaluators", "dinokit eval NAME KEY=VALUE, or evals.NAME.KEY=VALUE in a recipe"),
}
# Modules of the Python reference, with the question that each answers.
MODULES = {
    "dinokit.api": "The names of `import dinokit`",
    "dinokit.embedder": "For scikit-learn",
    "dinokit.weights": "Load and fill backbones",
    "dinokit.features": "Features of images",
    "dinokit.viz": "Pictures of features",
    "dinokit.heads": "Segmentation and depth heads",
    "dinokit.segment.predictor": "Masks of objects by prompts",
    "dinokit.language.aligned": "Images and texts in one space",
    "dinokit.segment.by_example": "Masks of what examples show",
    "dinokit.models": "The base class of backbones",
    "dinokit.losses": "What a loss sees",
    "dinokit.data.batch": "Batches",
    "dinokit.config.load": "Read recipes",
    "dinokit.config.registry": "Registries",
}


def main() -> None:
    """Write all pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "*.csv", "__pycache__"))
    shutil.copytree(ROOT / "configs", PAGES / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in PAGES.rglob("*.md"):
        path.write_text(page_text(path.read_text(encoding="utf-8"), ROOT / "docs"), encoding="utf-8")
    for name in ("README.md", *PROJECT_PAGES):
        text = page_text((ROOT / name).read_text(encoding="utf-8"), ROOT)
        (PAGES / name.replace("README", "index")).write_text(text, encoding="utf-8")
    (PAGES / "keys.md").write_text("\n".join(keys()) + "\n", encoding="utf-8")
    (PAGES / "reference.md").write_text("\n".join(python_reference()) + "\n", encoding="utf-8")


def page_text(text: str, folder: Path) -> str:
    """The text of a page in `folder`, with the links that it needs in build/pages."""

    def link(match: re.Match[str]) -> str:
        if match["label"] is None:  # a block of code
            return match[0]
        label, target, anchor = match["label"], match["target"], match["anchor"] or ""
        path = (folder / target).resolve()
        if not path.exists():
            raise FileNotFoundError(f"A page of {folder} links to {target}, which does not exist.")
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "docs":
            return f"{label}({path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        if relative.as_posix() == "README.md":
            return f"{label}(index.md{anchor})"
        if relative.suffix == ".yaml" or relative.as_posix() in PROJECT_PAGES:
            return f"{label}({relative.as_posix()}{anchor})"
        return label[1:-1]

    pattern = r"^```.*?^```|(?P<label>!?\[[^\]]*\])\((?P<target>(?!https?:|#)[^)#\s]+)(?P<anchor>#[^)]*)?\)"
    return re.sub(pattern, link, text, flags=re.M | re.S)


def keys() -> Iterator[str]:
    """The lines of the page of all keys."""
    yield "# Keys\n"
    yield "Every key with its default and meaning; `dinokit show RECIPE` prints those of a recipe."
    yield "Durations are in optimiser steps, a batch is images over all processes, sizes are in pixels.\n"
    yield from ("## Recipe\n", *table(config_keys(Recipe)))
    for kind, (title, form) in REGISTRIES.items():
        yield f"## {title}\n"
        yield f"`{form}`\n"
        for name in registry.names(kind):
            yield f"### {kind}: {name}\n"
            yield from table(config_keys(registry.read_config(kind, name)))


def table(keys: Iterable[tuple[str, str]]) -> list[str]:
    """A table of keys, defaults and meanings."""
    rows = []
    for text, meaning in keys:
        key, _, default = text.partition(" = ")
        key, _, needed = key.partition(" (")
        shown = f"`{default}`" if default else needed.rstrip(")")
        rows.append(f"| `{key}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return ["| key | default | meaning |", "|---|---|---|", *rows, ""] if rows else ["It has no keys.\n"]


def python_reference() -> Iterator[str]:
    """The lines of the page that mkdocstrings fills with docstrings."""
    yield "# Python, every name\n"
    yield "Docstrings; [Python](api.md) has examples. Names that are not here may change without notice.\n"
    for module, title in MODULES.items():
        yield f"## {title}\n"
        yield f"::: {module}\n"


if __name__ == "__main__":
    main()
