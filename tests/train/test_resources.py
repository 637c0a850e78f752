"""Memory of a run: estimates, what makes it smaller, a run that really has too little, and a dry run."""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.train import resources
from dinokit.train.plan import activation_memory, state_memory
from dinokit.train.run_dir import open_run

CPU = torch.device("cpu")


def large(*overrides):
    return load_recipe("dinov2_vitl14", ["data.path=x", "optim.batch=64", *overrides])


class Photos:
    """Images of noise, 240 pixels wide, of which some are spoiled; the time that one takes is counted."""

    classes = ()

    def __init__(self, images, spoiled=None, seconds=0.0):
        self.images, self.spoiled, self.seconds, self.read = images, spoiled or (lambda i, x: x), seconds, 0

    def __len__(self):
        return self.images

    def name(self, index):
        return f"{index}.npy"

    def __getitem__(self, index):
        self.read += 1
        time.sleep(self.seconds)
        noise = np.random.default_rng(index).integers(0, 256, (200, 240, 3), dtype=np.uint8)
        return self.spoiled(index, noise), -1


def unreadable(index, _):
    raise OSError(f"{index}.npy cannot be read: cut short")


SPOILED = {
    "cannot be read": lambda i, x: unreadable(i, x) if i == 3 else x,
    "have pixels that are not finite": lambda i, x: (x / 255 if i != 3 else x * np.nan).astype(np.float32),
    "have a side below 16 pixels": lambda i, x: x[:12] if i == 3 else x,
    "All images are grey": lambda i, x: np.repeat(x[..., :1], 3, axis=2),
    "have the pixels of another one": lambda i, x: np.zeros_like(x) if i < 3 else x,
}


@pytest.mark.parametrize("text", SPOILED)
def test_a_sample_of_the_images_is_looked_at_before_the_first_step(tiny, text):
    (line,) = resources.warning(tiny("run"), Photos(20, SPOILED[text]), CPU)
    assert text in line


def test_what_a_training_can_live_with_is_not_said(tiny):
    recipe = tiny("run", "crops.saturation=0", "crops.hue=0", "crops.gray=0")
    assert resources.warning(recipe, Photos(20, SPOILED["All images are grey"]), CPU) == []
    two_of_many = Photos(1000, lambda i, x: np.zeros_like(x) if i < 6 else x)
    assert resources.warning(recipe, two_of_many, CPU) == []


def test_the_look_ends_when_its_time_is_over(tiny, monkeypatch):
    monkeypatch.setattr(resources, "SECONDS", 0.1)
    source = Photos(10_000, seconds=0.03)
    resources.warning(tiny("run"), source, CPU)
    assert 1 <= source.read <= 5


def test_cached_files_count_as_free_memory(tmp_path, monkeypatch):
    page = tmp_path / "meminfo"
    page.write_text(
        "MemTotal: 8388608 kB\nMemFree: 1048576 kB\nMemAvailable: 3145728 kB\nCached: 2097152 kB\n"
    )
    monkeypatch.setattr(resources, "MEMINFO", page)
    assert resources.memory_available(CPU) == 3.0
    page.unlink()
    assert resources.memory_available(CPU) == float("inf")


def test_what_is_needed_is_state_and_the_activations_of_the_images_at_once():
    recipe = large("backbone.depth=2")
    parts = replace(recipe, run=replace(recipe.run, accumulate=4))
    saved = resources.memory_needed(recipe) - resources.memory_needed(parts)
    assert saved == pytest.approx(activation_memory(recipe, 64)[1] - activation_memory(recipe, 16)[1])
    # a block of ViT-L has 12.6 million parameters
    assert resources.memory_needed(recipe) > state_memory(recipe) > 5 * 4 * 25e6 / 2**30


@pytest.mark.slow
def test_three_changes_are_named_the_largest_saving_first():
    found = resources.savings(large())
    assert len(found) == 3
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    keys = [text.split("=")[0] for text, _ in found]
    assert "run.accumulate" in keys
    assert "run.checkpointing" in keys
    for text, saved in found:  # each is a setting that dinokit reads, and saves what it says
        setting = text.split(" ")[0]
        changed = load_recipe("dinov2_vitl14", ["data.path=x", "optim.batch=64", setting])
        assert resources.memory_needed(large()) - resources.memory_needed(changed) == pytest.approx(saved)


@pytest.mark.slow
def test_a_run_that_fits_gives_no_warning_and_one_that_does_not_says_what_helps(tiny, monkeypatch):
    recipe = tiny("run")
    monkeypatch.setattr(resources, "memory_available", lambda device: inf)
    assert resources.warning(recipe, Photos(10), CPU) == []
    (line,) = resources.warning(recipe, Photos(3), CPU)
    assert line.startswith("optim.batch=4 is more than the 3 images")
    monkeypatch.setattr(resources, "memory_available", lambda device: 8.0)
    first, second = resources.warning(large(), Photos(10_000), CPU)
    assert "8.0 GiB are free on cpu" in first
    assert second.startswith("What helps, one at a time:\n  run.")


def test_the_plan_of_a_run_is_kept_when_it_resumes(tiny, tmp_path):
    recipe = tiny("run")
    plan = resources.planned(recipe, CPU, 0.5)
    assert plan == {"device": "cpu", "memory_gib": resources.memory_needed(recipe), "seconds_per_step": 0.5}
    out = open_run(recipe, plan=plan)
    open_run(recipe, plan={**plan, "seconds_per_step": 9.0})
    assert json.loads((out / "plan.json").read_text()) == plan
    assert "seconds_per_step" not in resources.planned(recipe, CPU, 0.0)


def test_a_dry_run_tells_what_the_run_will_be_and_writes_nothing(tiny, tmp_path):
    recipe = tiny("run")
    before = sorted(tmp_path.rglob("*"))
    lines = resources.dry_run(recipe, registry.build("data.sources", recipe.data), CPU)
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
