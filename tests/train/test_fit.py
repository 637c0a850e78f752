"""Memory of a run: estimates, what makes it smaller, a run that really has too little, and a dry run."""

import os
import resource
import subprocess
import sys
from dataclasses import replace
from math import inf

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.train import fit
from dinokit.train.plan import activation_memory, state_memory

CPU = torch.device("cpu")


def large():
    return load_recipe("dinov2_vitl14", ["data.path=x", "optim.batch=64"])


def test_what_is_needed_is_state_and_the_activations_of_the_images_at_once():
    recipe = large()
    parts = replace(recipe, run=replace(recipe.run, accumulate=4))
    saved = fit.memory_needed(recipe) - fit.memory_needed(parts)
    assert saved == pytest.approx(activation_memory(recipe, 64)[1] - activation_memory(recipe, 16)[1])
    assert fit.memory_needed(recipe) > state_memory(recipe) > 5 * 4 * 300e6 / 2**30  # ViT-L has 304 million


def test_three_changes_are_named_the_largest_saving_first():
    found = fit.savings(large())
    assert len(found) == 3
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    keys = [text.split("=")[0] for text, _ in found]
    assert "run.accumulate" in keys
    assert "run.checkpointing" in keys
    for text, saved in found:  # each is a setting that dinokit reads, and saves what it says
        setting = text.split(" ")[0]
        changed = load_recipe("dinov2_vitl14", ["data.path=x", "optim.batch=64", setting])
        assert fit.memory_needed(large()) - fit.memory_needed(changed) == pytest.approx(saved)


def test_a_run_that_fits_gives_no_warning_and_one_that_does_not_says_what_helps(tiny, monkeypatch):
    recipe = tiny("run")
    monkeypatch.setattr(fit, "memory_available", lambda device: inf)
    assert fit.warning(recipe, 10, CPU) == []
    (line,) = fit.warning(recipe, 3, CPU)
    assert line.startswith("optim.batch=4 is more than the 3 images")
    monkeypatch.setattr(fit, "memory_available", lambda device: 8.0)
    first, second = fit.warning(large(), 10_000, CPU)
    assert "8.0 GiB are free on cpu" in first
    assert second.startswith("What helps, one at a time:\n  run.")


def test_a_dry_run_tells_what_the_run_will_be_and_writes_nothing(tiny, tmp_path):
    recipe = tiny("run")
    before = sorted(tmp_path.rglob("*"))
    lines = fit.dry_run(recipe, registry.build("data.sources", recipe.data), CPU)
    assert lines["images"] == "10, each seen 2.4 times"  # 6 steps of 4
    assert lines["the run"] == "6 steps, 24 images"
    assert {"parameters", "memory", "learning rate", "time", "device", "disk"} <= set(lines)
    assert sorted(tmp_path.rglob("*")) == before


def dinokit(*words, **more):
    command = [sys.executable, "-m", "dinokit", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **more)


@pytest.mark.slow
def test_a_run_without_enough_memory_ends_with_what_helps(photos, tmp_path):
    done = dinokit(
        "train", "small_photos", f"data.path={photos}", f"run.out={tmp_path / 'run'}", "optim.batch=32",
        "run.workers=0", "evals={}", "run.precision=fp32",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "Out of memory on cpu" in done.stderr
    assert "run.checkpointing=full (blocks are computed twice; slower): about" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_prints_the_plan_of_a_dry_run(photos, recipe_file, tmp_path):
    done = dinokit("train", str(recipe_file), f"data.path={photos}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "time: about 0:00:" in done.stdout
    assert not (tmp_path / "runs").exists()
