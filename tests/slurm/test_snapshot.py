"""What a job runs is the code as it was when the job was submitted."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dinokit.slurm.snapshot import APART, copy_code, copy_recipes, dotted

ROOT = Path(__file__).parents[2]

WHERE = """
import importlib
for module in ("eval", "eval.knn", "slurm", "configs", "losses.koleo", "commands.train", "config.registry"):
    print(importlib.import_module(f"dinokit.{module}").__file__)
print(importlib.import_module("mine.loss").__file__)
from dinokit.config.registry import names, recipe_names
assert "knn" in names("eval") and "scenes_cpu" in recipe_names()
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    package = tmp_path / "work/mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "loss.py").write_text("scale = 1\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_every_module_comes_from_the_copy_wherever_the_job_stands(tmp_path, own_package):
    code = tmp_path / "code"
    copy_code(code, {"mine.loss", "torch.nn", "nowhere.at_all"})
    assert sorted(path.name for path in code.iterdir()) == ["dinokit", "mine"]  # torch is installed
    env = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    for stands in (ROOT, own_package.parent):  # folders with packages of the same names
        done = subprocess.run(
            [sys.executable, "-c", WHERE], cwd=stands, env=env, capture_output=True, text=True, check=True
        )
        places = done.stdout.split()
        assert len(places) == 8
        assert all(Path(place).is_relative_to(code) for place in places), places


def test_no_folder_that_the_wheel_takes_from_elsewhere_is_forgotten():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {f"dinokit.{name}" for name in APART} == set(settings["package-dir"]) - {"dinokit"}


def test_a_recipe_is_copied_under_its_name_and_the_rest_of_a_command_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("a", "b"):
        Path(place).mkdir()
        Path(place, "mine.yaml").write_text(place)
    one, two = ["train", "a/mine.yaml", "x=absent.yaml"], ["eval", "all", "recipe=b/mine.yaml", "a/mine.yaml"]
    first, second = copy_recipes(tmp_path / "recipes", [one, two])
    Path("a/mine.yaml").write_text("edited")
    assert (first[0], first[2]) == ("train", "x=absent.yaml")
    assert Path(first[1]).name == "mine.yaml"
    assert (Path(first[1]).read_text(), Path(second[2].removeprefix("recipe=")).read_text()) == ("a", "b")
    assert second[3] == first[1]


def test_the_recipe_of_a_run_is_not_parted_from_it(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.touch()
    assert copy_recipes(tmp_path / "copies", [["train", str(recipe)]]) == [["train", str(recipe)]]


def test_modules_of_ones_own_are_found_in_names_and_keys():
    losses = {"mine.gram": {"weight": 1.0}, "dino": {}}
    assert dotted({"losses": losses, "data": {"name": "ours.tar", "path": "a.b"}}) == {
        "mine.gram",
        "ours.tar",
    }
