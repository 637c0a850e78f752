"""The package as users get it: metadata, one version, a wheel out of the sdist in a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from dinokit import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert newest[1] in ("Unreleased", __version__)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited is not None
    assert cited[1] == __version__


def test_the_extra_all_installs_every_extra_that_users_combine():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    asked = set(re.search(r"\[(.*)\]", everything)[1].split(","))
    # gpu and cpu exclude each other; page needs another Pillow than constraints.txt has
    assert asked == set(extras) - {"all", "gpu", "dev", "docs", "page"}


def run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of the tracked files, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    sdist = folder / run(sys.executable, "-c", code, "build_sdist", folder, cwd=tree).split()[-1]
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return sdist, folder / run(sys.executable, "-c", code, "build_wheel", folder, cwd=unpacked).split()[-1]


@pytest.mark.slow
def test_the_wheel_has_every_file_and_its_metadata(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = Parser().parsestr(file.read(f"dinokit-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    expected = {"dinokit/py.typed", f"dinokit-{__version__}.dist-info/licenses/LICENSE"}
    for top, place in {"dinokit": "dinokit", "eval": "dinokit/eval", "slurm": "dinokit/slurm",
                       "configs": "dinokit/configs"}.items():  # fmt: skip
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml", ".html"):
                expected.add(f"{place}/{path.relative_to(ROOT / top).as_posix()}")
    assert not expected - names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "hubconf.py", "configs/scenes_cpu.yaml"} <= inside


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(built, tmp_path):
    fresh, empty = tmp_path / "fresh", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=empty)
    python, program = fresh / "bin/python", fresh / "bin/dinokit"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1],
        cwd=empty)  # fmt: skip
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where, cwd=empty).strip())
    # The dependencies are those of this environment: only dinokit is fresh.
    shared = Path(torch.__file__).parents[1]
    assert not (shared / "dinokit").exists()
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
    place = run(python, "-c", "import dinokit; print(dinokit.__file__)", cwd=empty).strip()
    assert Path(place).is_relative_to(packages)
    assert run(program, "--version", cwd=empty).strip() == f"dinokit {__version__}"
    assert "optim:" in run(program, "show", "scenes_cpu", cwd=empty)
    small = ["backbone.depth=1", "optim.steps=1", "optim.batch=4", "optim.warmup=0", "evals=null",
             "run.workers=0", "losses={dino: {}}", "data.count=8", "data.test_count=8"]  # fmt: skip
    run(program, "train", "scenes_cpu", *small, "run.out=run", cwd=empty)
    assert "<html" in (empty / "run/report.html").read_text(encoding="utf-8")  # by the templates of the wheel
