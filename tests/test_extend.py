"""docs/extend.md: its files and commands, as a reader would copy them, with the installed program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinokit.config.load import load_recipe

PAGE = Path(__file__).parent.parent / "docs" / "extend.md"


@pytest.fixture
def folder(tmp_path):
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "my_package/__init__.py").touch()
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_the_folder_of_the_files(folder):
    (commands,) = re.findall(r"```\n(dinokit .*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = []
    for line in commands.strip().splitlines():
        words = line.partition("#")[0].split()[1:]
        code = "import sys; from dinokit.__main__ import command; sys.path[:] = sys.path[1:]; command()"
        run = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, env=environment,
                             capture_output=True, text=True)  # fmt: skip
        assert run.returncode == 0, run.stderr
        shown.append(run.stdout)
    assert "dinokit.load_backbone('runs/mine', trust=['my_package'])" in shown[0]
    assert "dinokit export" not in shown[0]  # no format has this backbone
    assert "keys of my_package.spread:\n    weight = 0.5" in shown[1]
    assert "pixels of the images" in shown[2]
    assert '"distance": ' in shown[3]
    saved = (folder / "runs/mine/recipe.yaml").read_text()
    assert re.search(r"my_package\.spread:\n\s+weight: 0\.1", saved)


def test_a_key_of_a_loss_of_another_package_is_given_as_any_other(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    recipe = load_recipe(folder / "my_recipe.yaml", ["losses.my_package.spread.weight=0.25"])
    assert recipe.losses["my_package.spread"] == {"weight": 0.25}
    recipe = load_recipe("scenes_cpu", ["losses.my_package.spread.weight=2", "losses.koleo.weight=0.2"])
    assert recipe.losses["my_package.spread"]["weight"] == 2
    assert recipe.losses["koleo"]["weight"] == 0.2
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]  # monkeypatch would put it back after the test
