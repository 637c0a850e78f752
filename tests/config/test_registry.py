"""Every entry of a registry keeps its contract, and another package can add entries."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

from dinokit import losses
from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.config.load import load_recipe, section_values
from dinokit.losses import Views

FUNCTIONS = {
    "models": "build",
    "losses": "build",
    "data.sources": "build",
    "data.dense": "build",
    "data.objects": "build",
    "data.pairs": "build",
    "eval": "evaluate",
}
FILES = [(kind, name) for kind in FUNCTIONS for name in registry.names(kind)]


def test_every_registry_has_entries():
    assert {kind for kind, _ in FILES} == set(FUNCTIONS)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_file_defines_a_config_and_its_function(kind, name):
    module = registry.find(kind, name)
    assert is_dataclass(module.Config)
    assert callable(getattr(module, FUNCTIONS[kind]))
    assert module.__doc__, f"{module.__name__} does not say what it is"


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_config_that_is_read_without_running_the_file_is_the_real_one(kind, name):
    real, read = registry.find(kind, name).Config, registry.read_config(kind, name)
    assert [described(item) for item in fields(read)] == [described(item) for item in fields(real)]
    for mark in ("uses", "least_images"):
        assert getattr(read, mark, None) == getattr(real, mark, None)


def described(item) -> tuple[str, str, str, str, dict[str, str]]:
    return item.name, str(item.type), repr(item.default), repr(item.default_factory), dict(item.metadata)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_what_a_field_is_read_with_can_be(kind, name):
    there = {item.name: item for item in fields(registry.read_config(kind, name))}
    for item in there.values():
        for other, wanted in item.metadata.get("only_if", {}).items():
            assert other in there
            assert isinstance(wanted, bool) or set(wanted) < set(get_args(there[other].type))


@pytest.mark.parametrize("name", registry.names("losses"))
def test_a_loss_has_a_weight(name):
    assert "weight" in {item.name for item in fields(registry.read_config("losses", name))}
    (loss,) = losses.build_losses({name: {"weight": 0.25}}, {"cls": 8, "patch": 8})
    assert loss.weight == 0.25


@pytest.mark.parametrize("name", registry.names("models"))
def test_a_backbone_says_how_many_channels_it_takes(name):
    assert "channels" in {item.name for item in fields(registry.read_config("models", name))}


@pytest.mark.parametrize("name", registry.names("eval"))
def test_a_source_inside_an_evaluator_says_which_split_it_stands_for(name):
    nested = [
        item.metadata for item in fields(registry.read_config("eval", name)) if "registry" in item.metadata
    ]
    image_registries = (
        "data.sources", "data.dense", "data.objects", "data.videos", "data.pairs", "data.clips",
        "data.captions",
    )  # fmt: skip
    assert all(
        about["registry"] in image_registries and about["split"] in ("train", "test") for about in nested
    )


def test_a_helper_beside_the_entries_is_no_entry():
    folder = Path(losses.__file__).parent
    helpers = {path.stem for path in folder.glob("*.py")} - set(registry.names("losses")) - {"__init__"}
    assert helpers
    for name in helpers:
        with pytest.raises(LookupError, match=f"'{name}' is not in the registry 'losses'"):
            registry.find("losses", name)


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
    (loss,) = losses.build_losses({"elsewhere.length": section}, {"cls": 8, "patch": 8})
    rows = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    none = torch.zeros(0)
    assert loss(Views(none, none, rows, none, none, none, 0.04)).item() == 3.0
    elsewhere.write_text(elsewhere.read_text().replace("power: one", "power: three"))
    with pytest.raises(ValueError, match=r"^losses\.elsewhere\.length\.power: .*three"):
        load_recipe(elsewhere)


def test_a_key_after_a_reset_of_a_loss_of_another_package_adds_to_its_defaults(elsewhere):
    changes = ["losses.elsewhere.length=null", "losses.elsewhere.length.weight=3"]
    assert load_recipe(elsewhere, changes).losses["elsewhere.length"] == {"weight": 3.0, "power": "two"}


def test_a_module_that_a_package_does_not_have_is_answered_with_one_that_it_has(elsewhere):
    with pytest.raises(LookupError, match=r"no 'lenght' in elsewhere, .*Did you mean 'length'\?"):
        load_recipe(elsewhere, ["losses.elsewhere.lenght.weight=1"])


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


HERE = "from dataclasses import dataclass\n\n\n@dataclass\nclass Config:\n    weight: float = 0.25\n"
METHOD = f"{HERE}\n    def __post_init__(self):\n        check(self.weight)\n"
FUNCTION = "\n\ndef build(cfg):\n    pass\n"


@pytest.mark.parametrize(
    "text",
    [
        f"from elsewhere.base import Config as Base\n\n\nclass Config(Base):\n    pass\n{FUNCTION}",
        f"from elsewhere.base import Config\n{FUNCTION}",
        f"from elsewhere.base import check\n{METHOD}{FUNCTION}",
        f"def check(weight):\n    assert weight > 0\n\n\n{METHOD}{FUNCTION}",
        f"from __future__ import annotations\nfrom elsewhere.base import Kind\n"
        f"{HERE}    kind: Kind | None = None\n{FUNCTION}",
        f"from typing import Any\n{HERE}\n\nbuild: Any = print\n",
        f"{HERE}\n\ntry:\n    from elsewhere.missing import build\nexcept ImportError:\n"
        f"    from elsewhere.base import check as build\n",
        "from elsewhere.base import *\n",
    ],
    ids=["no decorator", "imported", "method", "own function", "annotation", "typed", "in a block", "star"],
)  # fmt: skip
def test_config_and_function_of_another_package_are_those_that_python_finds(text, package):
    (package / "base.py").write_text(
        f"from enum import Enum\n{HERE}{FUNCTION}\n\ndef check(weight):\n    assert weight > 0\n\n\n"
        f"class Kind(Enum):\n    a = 1\n"
    )
    (package / "loss.py").write_text(text)
    assert section_values("losses", "elsewhere.loss", {}, "losses.elsewhere.loss")["weight"] == 0.25


def test_a_file_of_another_package_that_cannot_be_imported_is_named_with_its_line(package, capsys):
    (package / "loss.py").write_text(f"{HERE}{FUNCTION}\nimport elsewhere.missing\n")
    assert main(["show", "scenes_cpu", "losses.elsewhere.loss.weight=2"]) == 1
    said = capsys.readouterr().err
    assert "ModuleNotFoundError: No module named 'elsewhere.missing'" in said
    assert f"{package / 'loss.py'}, line 12" in said
