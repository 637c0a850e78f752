"""docs/gpu.md lists every file that asks for the device, each with tests that exist and need a GPU."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
TERMS = re.compile(
    r"'cuda'|torch\.cuda|\.type [!=]= '(?!meta)|'nccl'|xformers|varlen|\bpin_memory\b|\bpin=|GradScaler"
    r"|torch\.compile\(|block\.compile\(|autocast|non_blocking|torch\.accelerator"
)
NAMES_ALONE = {"dinokit/config/recipe.py"}  # the keys of a recipe
PARTS = (
    "Tests: ", "## Steps", "student forward", "ViT-S/16", "run.checkpointing=selective", "| sdpa |",
    "## Features", "Loader, all worker processes", "| 2 processes |", "Everything ran.",
)  # fmt: skip


def code(path):
    """The text of a file without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def rows():
    """File or files, branch and test of each row of the list."""
    listed = PAGE.partition("## Branches")[2]
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| `.*$", listed, re.M)
    ]


def gpu_tests(file):
    """The tests of a file that are marked `gpu`, or some of whose cases are."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    whole = any("pytestmark = pytest.mark.gpu" in ast.unparse(node) for node in tree.body)
    of_cases = {
        target.id for node in tree.body
        if isinstance(node, ast.Assign) and "mark.gpu" in ast.unparse(node.value)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
            if whole or "mark.gpu" in marks or any(name in marks for name in of_cases):
                yield node.name


def test_every_file_that_asks_for_the_device_is_listed_and_no_other():
    files = [path for top in ("dinokit", "eval", "slurm") for path in (ROOT / top).rglob("*.py")]
    asking = {path.relative_to(ROOT).as_posix() for path in files if TERMS.search(code(path))} - NAMES_ALONE
    listed = {file for row in rows() for file in re.findall(r"`([^`]+)`", row[0])}
    new, gone = sorted(asking - listed), sorted(listed - asking)
    assert not new, f"docs/gpu.md, list of branches: add {new}, each with a test marked `gpu`"
    assert not gone, f"docs/gpu.md, list of branches: {gone} no longer ask for the device"


def test_every_entry_names_a_test_that_needs_a_gpu():
    named = {name for row in rows() for name in re.findall(r"`(tests/[^`]+)`", row[2])}
    assert len(named) > 20
    assert all(re.search(r"`tests/", row[2]) for row in rows())
    for file, test in (name.split("::") for name in named):
        assert test in set(gpu_tests(file)), f"{file}::{test} is missing, or has no mark `gpu`"


def test_every_test_that_needs_a_gpu_is_listed():
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    files = [path.relative_to(ROOT).as_posix() for path in files if path != Path(__file__)]
    assert {f"{file}::{test}" for file in files for test in gpu_tests(file)} == set(
        re.findall(r"`(tests/[^`]+)`", PAGE.partition("## Branches")[2])
    ) - {"tests/gpu/test_branches.py"}


def test_without_a_gpu_the_check_says_so():
    words = [sys.executable, str(ROOT / "tests/gpu/check.py"), "--out", "/dev/null"]
    done = subprocess.run(words, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "There is no GPU here" in done.stdout


@pytest.mark.slow
def test_the_check_takes_its_way_on_small_networks_too(tmp_path):
    page = tmp_path / "page.md"
    words = [sys.executable, str(ROOT / "tests/gpu/check.py"), "--device", "cpu", "--out", str(page)]
    done = subprocess.run(words, capture_output=True, text=True)
    text = page.read_text()
    assert done.returncode == 0, text + done.stderr
    for part in PARTS:
        assert part in text
    assert "no number means anything" in text
