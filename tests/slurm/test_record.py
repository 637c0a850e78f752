"""Records are found by the number of a job or an array; a job runs the code of the time of submission."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dinokit import slurm
from dinokit.slurm import TOP_LEVEL, copy_code, copy_recipes, dotted_names

ROOT = Path(__file__).parents[2]

PRINT_FILES = """
import importlib
for module in ("eval", "eval.knn", "slurm", "configs", "losses.koleo", "commands.train", "config.registry"):
    print(importlib.import_module(f"dinokit.{module}").__file__)
print(importlib.import_module("mine.loss").__file__)
from dinokit.config.registry import names, recipe_names
assert "knn" in names("eval") and "scenes_cpu" in recipe_names()
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, many = slurm.new_folder("train-a"), slurm.new_folder("train-a")  # within the same second
    slurm.write_record(one, ["7"], [["train", "a"]], ["profile=cpu"])
    slurm.write_record(many, ["9_0", "9_1"], [["eval", "x"], ["eval", "y"]], ["profile=cpu"])
    slurm.new_folder("refused")  # a folder without a record is no submission
    return one, many


def test_a_record_is_read_back_as_it_was_written(two):
    one, many = slurm.read_records()
    assert (one.number, one.commands, one.settings) == ("7", [["train", "a"]], ["profile=cpu"])
    assert (many.number, many.jobs) == ("9", ["9_0", "9_1"])
    assert [each.folder.endswith(path.name) for each, path in zip((one, many), two, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize(("word", "jobs"), [("7", ["7"]), ("9", ["9_0", "9_1"]), ("9_1", ["9_1"])])
def test_a_number_finds_its_jobs(two, word, jobs):
    [(_, found)] = slurm.find_jobs([word])
    assert found == jobs


def test_an_unknown_number_is_an_error_that_lists_the_known_ones(two):
    with pytest.raises(LookupError, match=r"No job 8 was submitted from here \(/.*\). Known jobs: 7, 9."):
        slurm.find_jobs(["7", "8"])


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    package = tmp_path / "work/mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "loss.py").write_text("scale = 1\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


@pytest.mark.slow
def test_every_module_comes_from_the_copy_in_any_working_folder(tmp_path, own_package):
    code = tmp_path / "code"
    copy_code(code, {"mine.loss", "torch.nn", "nowhere.at_all"})
    assert sorted(path.name for path in code.iterdir()) == ["dinokit", "mine"]  # torch is installed
    env = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    for cwd in (ROOT, own_package.parent):  # folders with packages of the same names
        process = subprocess.run(
            [sys.executable, "-c", PRINT_FILES], cwd=cwd, env=env, capture_output=True, text=True, check=True
        )
        files = process.stdout.split()
        assert len(files) == 8
        assert all(Path(file).is_relative_to(code) for file in files), files


def test_all_top_level_packages_of_the_wheel_are_copied():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {f"dinokit.{name}" for name in TOP_LEVEL} == set(settings["package-dir"]) - {"dinokit"}


def test_a_recipe_is_copied_and_the_rest_of_a_command_is_unchanged(tmp_path, monkeypatch):
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


def test_the_recipe_of_a_run_is_not_copied(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.touch()
    assert copy_recipes(tmp_path / "copies", [["train", str(recipe)]]) == [["train", str(recipe)]]


def test_dotted_names_are_found_in_names_and_keys():
    losses = {"mine.gram": {"weight": 1.0}, "dino": {}}
    assert dotted_names({"losses": losses, "data": {"name": "ours.tar", "path": "a.b"}}) == {
        "mine.gram",
        "ours.tar",
    }
