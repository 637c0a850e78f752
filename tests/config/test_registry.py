"""Every file on a shelf keeps the shelf's contract, and a shelf can be added to from another package."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.losses import Views

VERBS = {
    "models": "build",
    "losses": "build",
    "data.sources": "build",
    "data.dense": "build",
    "eval": "evaluate",
}
FILES = [(shelf, name) for shelf in VERBS for name in registry.names(shelf)]


def test_there_is_something_on_every_shelf():
    assert {shelf for shelf, _ in FILES} == set(VERBS)


@pytest.mark.parametrize(("registry", "name"), FILES)
def test_a_file_defines_a_config_and_its_verb(shelf, name):
    module = registry.find(shelf, name)
    assert is_dataclass(module.Config)
    assert callable(getattr(module, VERBS[shelf]))
    assert module.__doc__, f"{module.__name__} does not say what it is"


@pytest.mark.parametrize(("registry", "name"), FILES)
def test_the_config_that_is_read_without_running_the_file_is_the_real_one(shelf, name):
    real, read = registry.find(shelf, name).Config, registry.read_config(shelf, name)
    assert [described(item) for item in fields(read)] == [described(item) for item in fields(real)]
    for mark in ("uses", "least_images"):
        assert getattr(read, mark, None) == getattr(real, mark, None)


def described(item) -> tuple[str, str, str, str, dict[str, str]]:
    return item.name, str(item.type), repr(item.default), repr(item.default_factory), dict(item.metadata)


@pytest.mark.parametrize(("registry", "name"), FILES)
def test_what_a_field_is_read_with_can_be(shelf, name):
    there = {item.name: item for item in fields(registry.read_config(shelf, name))}
    for item in there.values():
        for other, wanted in item.metadata.get("only_with", {}).items():
            assert other in there
            assert isinstance(wanted, bool) or set(wanted) < set(get_args(there[other].type))


@pytest.mark.parametrize("name", registry.names("losses"))
def test_a_loss_has_a_weight(name):
    assert "weight" in {item.name for item in fields(registry.read_config("losses", name))}
    assert registry.build("losses", {"name": name, "weight": 0.25}).weight == 0.25


@pytest.mark.parametrize("name", registry.names("models"))
def test_a_backbone_says_how_many_channels_it_takes(name):
    assert "channels" in {item.name for item in fields(registry.read_config("models", name))}


@pytest.mark.parametrize("name", registry.names("eval"))
def test_a_source_inside_an_evaluator_says_which_split_it_stands_for(name):
    nested = [
        item.metadata for item in fields(registry.read_config("eval", name)) if "registry" in item.metadata
    ]
    shelves_of_images = ("data.sources", "data.dense", "data.videos")
    assert all(
        about["registry"] in shelves_of_images and about["split"] in ("train", "test") for about in nested
    )


def test_names_with_an_underscore_are_off_the_shelf():
    folder = Path(registry.__file__).parent / "losses"
    assert (folder / "_targets.py").is_file()
    assert "_targets" not in registry.names("losses")
    with pytest.raises(LookupError, match="'_targets' is not on the shelf 'losses'"):
        registry.find("losses", "_targets")


def test_what_a_file_itself_cannot_import_is_not_taken_for_a_missing_file(package):
    (package / "broken_loss.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        registry.find("losses", "elsewhere.broken_loss")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """An importable package `elsewhere`, empty."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "elsewhere"]:
        del sys.modules[name]


LENGTH = '''"""The length of the class token's feature."""
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn

from dinokit.losses import Views

DEFAULT = 2.0


class Power(StrEnum):
    one = "one"
    two = "two"


@dataclass
class Config:
    weight: float = DEFAULT
    power: Power = Power.two


class Length(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.power = cfg.weight, {"one": 1, "two": 2}[cfg.power]

    def forward(self, views: Views) -> torch.Tensor:
        return (views.student_feature.norm(dim=-1) ** self.power).mean()


build = Length
'''

FLAT = '''"""Images of one colour."""
from dataclasses import dataclass

from PIL import Image


@dataclass
class Shade:
    image: Image.Image


@dataclass
class Config:
    shade: int = "???"
    count: int = 3
    size: int = 8


class Flat:
    classes = ()

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __len__(self) -> int:
        return self.cfg.count

    def __getitem__(self, index):
        return Image.new("RGB", (self.cfg.size, self.cfg.size), (self.cfg.shade,) * 3), -1

    def name(self, index: int) -> str:
        return f"flat {index}"


build = Flat
'''


@pytest.fixture
def elsewhere(package) -> Path:
    """A recipe that uses a loss and a source of another package."""
    (package / "length.py").write_text(LENGTH)
    (package / "flat.py").write_text(FLAT)
    recipe = package / "mine.yaml"
    recipe.write_text(
        "backbone: {name: vit, size: 32, width: 24, depth: 1, heads: 3, patch: 8}\n"
        "losses: {dino: {}, elsewhere.length: {power: one}}\n"
        "data: {name: elsewhere.flat, shade: 7}\n"
        "optim: {steps: 2, batch: 2, lr: 1e-3}\n"
    )
    return recipe


def test_a_loss_of_another_package_is_checked_completed_and_built(elsewhere):
    section = load_recipe(elsewhere).losses["elsewhere.length"]
    assert section["weight"] == 2.0
    loss = registry.build("losses", {"name": "elsewhere.length", **section})
    rows = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    none = torch.zeros(0)
    assert loss(Views(none, none, rows, none, none, none, 0.04, True)).item() == 3.0
    elsewhere.write_text(elsewhere.read_text().replace("power: one", "power: three"))
    with pytest.raises(ValueError, match=r"^losses\.elsewhere\.length\.power: .*three"):
        load_recipe(elsewhere)


def test_a_source_of_another_package_is_checked_completed_and_built(elsewhere):
    source = registry.build("data.sources", load_recipe(elsewhere, ["data.count=5"]).data)
    image, label = source[0]
    assert isinstance(image, Image.Image)
    assert (len(source), image.size, image.getpixel((0, 0)), label) == (5, (8, 8), (7, 7, 7), -1)
    with pytest.raises(ValueError, match=r"^data\.shade must be given"):
        load_recipe(elsewhere, ["data.shade=???"])


def test_a_file_without_a_config_is_named(package):
    (package / "nothing.py").write_text("build = dict\n")
    with pytest.raises(LookupError, match=r"nothing\.py defines no dataclass `Config`"):
        registry.read_config("losses", "elsewhere.nothing")
