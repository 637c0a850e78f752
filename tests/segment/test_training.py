"""Training a head: it learns, resumes bit for bit, and any number of processes learns the same."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.objects import objects_of_ids
from dinokit.segment.encoder import Encoder, Items
from dinokit.segment.recipe import Config, Optim, Prompts, Run
from dinokit.segment.rounds import PromptableTask, draw_sample
from dinokit.segment.saved import NAME, load_head
from dinokit.segment.training import factor, train_head
from dinokit.weights.checkpoint import read_safetensors

SIZES = {"size": 32, "split": "train", "count": 6}
SCENES = {"name": "scenes", **SIZES}


@pytest.fixture
def source():
    return registry.build("data.objects", SCENES)


def config(out, steps=4, **run):
    return Config(
        name="tiny",
        size=32,
        prompts=Prompts(objects=2, rounds=2, min_area=8),
        optim=Optim(steps=steps, batch=2, warmup=1, lr=3e-3),
        run=Run(out=str(out), log_every=1, checkpoint_every=2, device="cpu", **run),
    )


def tensors(path):
    return read_safetensors(path)[0]


def test_an_image_reaches_the_canvas_as_it_is(source, backbone):
    item = Items(source, Encoder(backbone, 32), 1.0)[1]
    image, objects = source[1]
    assert (item.canvas.permute(1, 2, 0).numpy() == image).all()
    assert (item.mask(0).numpy() == objects.mask(0)).all()
    assert item.features.shape == (48, 4, 4)


def test_a_source_that_gives_maps_in_place_of_objects_is_refused_with_the_function_that_makes_them(
    source, backbone, monkeypatch
):
    image, objects = source[0]
    ids = objects.mask(0).astype(np.uint8)
    monkeypatch.setattr(type(source), "__getitem__", lambda self, index: (image, ids))
    with pytest.raises(
        ValueError, match=r"a ndarray, not with Objects: dinokit\.data\.objects\.objects_of_ids"
    ):
        Items(source, Encoder(backbone, 32), 1.0)[0]
    monkeypatch.setattr(type(source), "__getitem__", lambda self, index: (image, objects_of_ids(ids)))
    assert (Items(source, Encoder(backbone, 32), 1.0)[0].objects.mask(0) == objects.mask(0)).all()


@pytest.mark.gpu
def test_features_of_a_gpu_are_those_of_the_cpu(source, backbone):
    canvas = Items(source, Encoder(backbone, 32), 1.0)[1].canvas
    want = Encoder(backbone, 32).features(canvas).float()
    got = Encoder(backbone.cuda(), 32).features(canvas)
    assert got.is_cuda
    torch.testing.assert_close(got.float().cpu(), want, rtol=0.02, atol=0.02)


def test_images_that_are_not_kept_give_the_same(source, backbone):
    encoder = Encoder(backbone, 32)
    kept, forgotten = Items(source, encoder, 1.0), Items(source, encoder, 0.0)
    for index in (0, 1, 0):
        assert (kept[index].features == forgotten[index].features).all()
    assert len(kept._kept) == 2
    assert not forgotten._kept


def test_a_sample_is_a_function_of_seed_step_and_place(source, backbone):
    items, cfg = Items(source, Encoder(backbone, 32), 1.0), Prompts(objects=3, rounds=2, min_area=8)
    one, again, other = (draw_sample(items, cfg, 0, step, 2, 1) for step in (5, 5, 6))
    for key in ("canvas", "truth", "image", "draws", "noise", "boxed"):
        assert (getattr(one, key) == getattr(again, key)).all()
    assert (one.draws != other.draws).all()
    with pytest.raises(ValueError, match=r"has an object of prompts.min_area=900"):
        draw_sample(items, replace(cfg, min_area=900), 0, 0, 2, 0)


def test_padding_is_no_part_of_the_image(backbone):
    class Wide(Discs):
        def __getitem__(self, index):
            image, objects = super().__getitem__(index)
            return image.crop((0, 0, 32, 16)), objects_of_ids(objects.mask(0)[:16].astype(np.uint8))

    sample = draw_sample(
        Items(Wide(), Encoder(backbone, 32), 1.0), Prompts(objects=2, min_area=1), 0, 0, 1, 0
    )
    assert sample.image[:, :16].all()
    assert not sample.image[:, 16:].any()


def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(source, backbone):
    """What makes two processes equal to one: each sums its places, and the divisor is that of all."""
    torch.manual_seed(0)
    task = PromptableTask(config("unused"), Items(source, Encoder(backbone, 32), 1.0))
    whole, _ = task.loss(3, [0, 1])
    parts = [task.loss(3, [place])[0] for place in (0, 1)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["promptable", "unified"])
def test_a_run_that_stopped_ends_as_one_that_did_not(source, backbone, tmp_path, kind):
    whole = train_head(replace(config(tmp_path / "whole"), kind=kind), backbone, source)
    cfg = replace(config(tmp_path / "stopped"), kind=kind)
    code = f"""
import os, signal, torch
from dinokit.config import registry
from dinokit.models import build
from dinokit.segment import training
from dinokit.segment.recipe import *
step = training.HeadTrainer._step
def stopping(self, number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, number)
training.HeadTrainer._step = stopping
torch.manual_seed(0)
backbone = build({{"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}}).eval()
cfg = {cfg!r}
training.train_head(cfg, backbone, registry.build("data.objects", {SCENES!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "stopped after step 3" in done.stdout, done.stderr
    stopped = train_head(cfg, backbone, source)
    a, b = tensors(whole), tensors(stopped)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    log = (tmp_path / "stopped" / "run.log").read_text()
    assert "resumes after step 3" in log


def test_a_run_belongs_to_its_recipe_and_its_backbone(source, backbone, tmp_path):
    section = section_values("data.objects", "scenes", SIZES, "")
    cfg = replace(config(tmp_path / "run", steps=1), objects={"name": "scenes", **section})
    path = train_head(cfg, backbone, source)
    with pytest.raises(ValueError, match=r"optim.lr was 0.003, now 0.1"):
        train_head(replace(cfg, optim=replace(cfg.optim, lr=0.1)), backbone, source)
    other = registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4})
    other.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="The fingerprint of the backbone was"):
        train_head(cfg, other.eval(), source)
    renamed = registry.build("data.objects", {**SCENES, "split": "test", "test_count": 6})
    with pytest.raises(ValueError, match=r"The order of images was .*scenes train 0.* and now is"):
        train_head(cfg, backbone, renamed)
    with pytest.raises(ValueError, match="trained on the features of other weights"):
        load_head(path, other.eval(), "promptable")
    head, encoder, about = load_head(path.parent, backbone, "promptable")
    assert (encoder.side, about.steps, about.objects["count"]) == (32, 1, 6)
    assert not head.training
    with pytest.raises(LookupError, match=f"There is no head .*{NAME}"):
        load_head(tmp_path, backbone, "promptable")
    (tmp_path / NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no head that dinokit train-head saved"):
        load_head(tmp_path, backbone, "promptable")


def test_a_run_can_begin_with_another_head(source, backbone, tmp_path):
    first = train_head(config(tmp_path / "first", steps=1), backbone, source)
    cfg = config(tmp_path / "second", steps=1)
    cfg = replace(cfg, start=str(first.parent), optim=replace(cfg.optim, lr=0.0))
    second = train_head(cfg, backbone, source)
    assert all(torch.equal(x, tensors(second)[key]) for key, x in tensors(first).items())
    wide = replace(cfg, head=replace(cfg.head, hidden=32), run=replace(cfg.run, out=str(tmp_path / "third")))
    with pytest.raises(ValueError, match="has other sizes"):
        train_head(wide, backbone, source)
    first.unlink()
    train_head(cfg, backbone, source)  # a run that resumes needs it no more


def test_the_rate_rises_and_falls_to_zero():
    assert [factor(step, 10, 2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert factor(6, 10, 2) == pytest.approx(0.5)
    assert factor(10, 10, 2) == pytest.approx(0)
    assert factor(0, 1, 1) == 1


def test_a_canvas_that_is_no_multiple_of_the_patch_is_refused(backbone):
    with pytest.raises(ValueError, match=r"size=30 is no multiple .* take size=32"):
        Encoder(backbone, 30)


@pytest.mark.slow
def test_a_head_learns_to_find_a_disc_from_a_click(backbone, tmp_path):
    """Bright discs on a dark ground, one clicked: after 200 steps the masks overlap them by more than 0.8."""
    optim = Optim(steps=200, batch=4, warmup=20, lr=3e-3)
    path = train_head(replace(config(tmp_path), optim=optim), backbone, Discs())
    log = [line for line in (path.parent / "metrics.jsonl").read_text().splitlines() if "iou_1" in line]
    last = [json.loads(line)["iou_1"] for line in log[-10:]]
    assert sum(last) / 10 > 0.8


class Discs:
    """Images with two bright discs; an object each."""

    classes = ("disc",)

    def __len__(self):
        return 64

    def name(self, index):
        return f"disc {index}"

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:32, :32]
        ids = np.zeros((32, 32), np.uint8)
        for number, left in ((1, 0), (2, 16)):
            cx, cy, r = left + 8 + rng.uniform(-1, 1), rng.uniform(8, 24), rng.uniform(4, 6)
            ids[np.hypot(x - cx, y - cy) < r] = number
        pixels = np.where(ids[..., None] > 0, 220, 30) + rng.integers(-20, 20, (32, 32, 3))
        return Image.fromarray(pixels.astype(np.uint8)), objects_of_ids(ids)
