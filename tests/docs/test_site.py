"""The documentation site: pages, links and keys are complete. `make docs` builds it, warnings are errors."""

import csv
import importlib.util
import re
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from dinokit.config import registry
from dinokit.config.recipe import Recipe

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    module = script("pages")
    module.PAGES = tmp_path_factory.mktemp("pages") / "pages"
    module.main()
    return module.PAGES


def nav(entries):
    for entry in entries:
        for value in entry.values():
            yield from nav(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page(pages):
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(nav(project["nav"])) == sorted(path.name for path in pages.glob("*.md"))


def test_every_link_of_a_page_leads_somewhere(pages):
    for page in pages.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_leave_no_page_of_the_site_for_a_file_outside():
    module = script("pages")
    assert module.page_text("[a](../configs/laptop.yaml)", ROOT / "docs") == "[a](configs/laptop.yaml)"
    assert module.page_text("[b](docs/scale.md#x)", ROOT) == "[b](scale.md#x)"
    assert module.page_text("[`c`](../dinokit/config/recipe.py)", ROOT / "docs") == "`c`"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.md"):
        module.page_text("[d](nowhere.md)", ROOT)


def key_names(cls, prefix=""):
    for item in fields(cls):
        if isinstance(item.type, type) and is_dataclass(item.type):
            yield from key_names(item.type, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def test_the_reference_has_every_key_with_its_default(pages):
    text = (pages / "keys.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\S+)` \| (.*?) \|", text.split("## Backbones")[0], re.M))
    assert list(rows) == list(key_names(Recipe))
    assert rows["crops.globals.count"] == "`2`"
    assert rows["crops.locals.count"] == "`8`"  # of the section, not of its class
    assert rows["optim.steps"] == "must be given"
    for kind in script("pages").REGISTRIES:
        for name in registry.names(kind):
            assert f"### {kind}: {name}\n" in text


def test_the_curves_of_the_recipes_are_drawn_from_their_table(tmp_path):
    script("curves").main(str(tmp_path))
    with (ROOT / "docs/recipes/curves.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for picture in (tmp_path / f"{row['recipe']}.svg", ROOT / f"docs/recipes/{row['recipe']}.svg"):
            assert row["variant"] in picture.read_text(encoding="utf-8"), f"python docs/curves.py: {picture}"
