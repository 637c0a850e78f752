"""dinokit bench, typed: every kind, on a small network."""

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinokit.__main__ import main
from dinokit.bench import SyntheticImages
from dinokit.bench.step import Form, bench_steps, model_flops, plain
from dinokit.config.load import load_recipe
from dinokit.data.loader import training_loader
from dinokit.data.sources.scenes import Config, build
from dinokit.models import fused
from dinokit.runtime.log import read_records
from dinokit.train.networks import block_masks
from dinokit.train.student_teacher import StudentTeacher

SMALL = [
    "backbone.width=24", "backbone.depth=2", "backbone.heads=2", "backbone.size=48", "crops.globals.size=48",
    "crops.locals.size=16", "crops.locals.count=2", "heads.cls.prototypes=64", "heads.cls.hidden=16",
    "heads.cls.bottleneck=8", "run.precision=fp32", "run.workers=0", "run.device=cpu",
]  # fmt: skip


def printed(capsys, *words, rounds=2):
    assert main(["bench", *words, *SMALL, f"rounds={rounds}", "--json", "--traceback"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["bench"], found["recipe"], found["rounds"]) == (words[0], "small_photos", rounds)
    assert (found["device"], found["precision"]) == ("cpu", "fp32")
    assert found["threads"] == torch.get_num_threads()
    given = found.get("as given", found)
    for rates in (given, found.get("plain", given)):
        assert {"matmul_fp32", "matmul_bf16"} <= rates.keys()  # their arithmetic: test_machine.py
    return found


@pytest.mark.slow
def test_a_step_is_measured_beside_its_plain_form(capsys):
    found = printed(capsys, "step", "batch=2", "--against", "plain")
    assert found["speed_against_plain"] > 0
    for form in ("as given", "plain"):
        report = found[form]
        assert len(report["seconds"]) == 2
        assert report["milliseconds"].keys() == {
            "load", "transfer", "colour", "teacher", "student forward", "losses", "backward", "optimiser",
            "EMA",
        }  # fmt: skip
        assert report["images_per_second"] == pytest.approx(2 / (sum(report["seconds"]) / 2))
        assert 0 < report["idle_gib"] < report["peak_gib"] < 4
        assert 0 < report["share_of_matmul"] < 1
    assert found["as given"]["model_flops"] == found["plain"]["model_flops"]


@pytest.mark.slow
def test_a_step_is_measured_beside_one_with_other_settings(capsys):
    other = "crops.locals.count=0,crops.globals.scale=[0.5,1.0]"
    found = printed(capsys, "step", "batch=2", "--against", other)
    assert found[other]["model_flops"] < found["as given"]["model_flops"]
    pairs = zip(found["as given"]["seconds"], found[other]["seconds"], strict=True)
    assert found["speed_against_other"] == pytest.approx(sum(b / a for a, b in pairs) / 2)


@pytest.mark.slow
def test_a_step_with_signals_and_trackers_is_measured_beside_a_silent_one(capsys):
    found = printed(capsys, "step", "batch=2", "run.log=[tensorboard]", "--against", "silent")
    for clock in ("seconds", "cpu_seconds"):
        pairs = zip(found["as given"][clock], found["silent"][clock], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        assert found[f"{clock}_against_silent"] == pytest.approx(sum(ratios) / 2)  # the median of two


def test_what_is_recorded_of_a_step_in_a_bench():
    recipe = load_recipe("small_photos", [*SMALL, "data={name: scenes}", "optim.batch=2", "run.device=cpu"])
    silent, loud = Form(recipe, 1, False, "nothing"), Form(recipe, 1, False, "all")
    silent.work()
    assert silent.step.model.signals == {}
    loud.work()
    assert "feature_rank" in loud.step.model.signals
    (record,) = read_records(Path(loud.log.folder.name))
    assert {"dino", "feature_rank", "grad_backbone"} <= record.keys()
    loud.log.end()


@pytest.mark.slow
def test_a_step_is_measured_on_images_that_other_processes_load():
    recipe = load_recipe(
        "small_photos", [*SMALL, "data={name: scenes}", "optim.batch=2", "run.workers=1", "run.device=cpu"]
    )
    (report,) = bench_steps([recipe], 2, real=True)
    assert len(report.seconds) == 2
    assert report.milliseconds["load"] > 0
    assert multiprocessing.active_children() == []


def test_a_frozen_teacher_is_refused_before_anything_starts():
    recipe = load_recipe(
        "small_photos", [*SMALL, "data={name: scenes}", "masks=null", "teacher.frozen=runs/old"]
    )
    with pytest.raises(ValueError, match=r"average, and small_photos has teacher\.frozen=runs/old\. Give"):
        bench_steps([recipe], 1, real=False)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_any_error_in_the_process_is_raised_in_the_parent():
    recipe = load_recipe("small_photos", [*SMALL, "data={name: scenes}", "run.device=cpu"])
    broken = replace(recipe, run=replace(recipe.run, seed=None))
    with pytest.raises(TypeError, match="NoneType"):
        bench_steps([broken], 1, real=False)


@pytest.mark.slow
def test_the_data_path_is_measured_part_by_part(capsys):
    found = printed(capsys, "data")
    assert (found["batch"], found["threads"]) == (32, 1)
    rates = found["images_per_second"]
    assert rates.keys() == {"decode", "cut", "colour", "decode and cut", "all"}
    assert min(rates.values()) > 0


@pytest.mark.slow
def test_the_data_path_takes_as_many_images_as_are_asked_for(capsys, monkeypatch):
    read, stored = [], SyntheticImages.stored
    monkeypatch.setattr(
        SyntheticImages, "stored", lambda files, index: read.append(index) or stored(files, index)
    )
    assert printed(capsys, "data", "batch=2", rounds=1)["batch"] == 2
    two = len(read)
    printed(capsys, "data", "batch=6", rounds=1)
    assert len(read) - two == 3 * two > 0


GRAY = ["crops.hue=0", "crops.saturation=0", "crops.gray=0"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_that_need_no_data_set_have_the_channels_that_are_asked_for(channels):
    files = SyntheticImages(channels)
    picture, label = files[3]
    assert (*np.shape(picture), 1)[:3] == (375, 500, channels)
    assert label == -1
    assert 20 < np.std(picture) < 60
    assert files.stored(3) != files.stored(4)


def test_the_data_path_follows_the_channels(capsys):
    mean = ["crops.mean=[0.5]", "crops.std=[0.5]"]
    assert printed(capsys, "data", *mean, *GRAY, "batch=2", rounds=1)["images_per_second"]["all"] > 0


@pytest.mark.parametrize(
    "more", [[], ["backbone.channels=4", "crops.mean=[0,0,0,0]", "crops.std=[1,1,1,1]", *GRAY]]
)
def test_a_step_on_images_that_need_no_data_set_takes_reduced_ones_and_any_channels(more):
    words = [*SMALL, "data={name: scenes}", "optim.batch=2", "run.keep_memory=false", "crops.decode=reduced"]
    batches = Form(load_recipe("small_photos", [*words, *more]), 1, real=False).batches
    assert next(batches).global_crops.shape == (4, 4 if more else 3, 48, 48)


def test_attention_and_frozen_features_are_measured(capsys):
    found = printed(capsys, "attention", "batch=2")
    assert found["milliseconds"]["sdpa"] > 0
    assert found["rows"] == 2 * 2 * 10 + 2 * 2 * 2
    found = printed(capsys, "eval")
    assert found["batch"] == 8
    assert found["images_per_second"] > 0


def test_the_first_line_says_what_it_was_measured_on(capsys):
    assert main(["bench", "eval", *SMALL, "run.precision=bf16", "batch=2", "rounds=1"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    threads = torch.get_num_threads()
    assert re.fullmatch(
        rf"small_photos, batch 2, bf16 on cpu \({threads} threads?\), 1 round; "
        r"this machine multiplies at \d+ \(fp32\) and \d+ \(bf16\) GFLOP/s",
        first,
    )
    assert re.fullmatch(r"images_per_second [\d,.]+", second)


def test_a_frozen_teacher_that_a_recipe_wants_is_asked_for(capsys):
    assert main(["bench", "eval", "dinov2_distill_vits14"]) == 2
    assert "teacher.frozen must be given" in capsys.readouterr().err


def test_flops_counted_without_data_are_those_of_a_real_step():
    recipe = load_recipe("small_photos", [*SMALL, "data={name: scenes}", "optim.batch=2", "run.logits=whole"])
    model = StudentTeacher(recipe).train()
    fused.install(model)  # as the trainer does
    masks = block_masks(recipe, model.student.backbone)
    batches = training_loader(
        build(Config(size=48)), recipe.crops, masks, seed=0, start_step=0, steps=1, batch=2, workers=0
    )
    batch = next(iter(batches))
    counted = model_flops(recipe, batch)
    batch.global_crops, batch.local_crops = batch.global_crops.float(), batch.local_crops.float()
    with FlopCounterMode(display=False) as counter:
        sum(model(batch, 0.07).values()).backward()
    assert counted == counter.get_total_flops()


def test_a_step_that_cannot_be_run_is_an_error():
    recipe = load_recipe(
        "small_photos", [*SMALL, "data={name: scenes}", "run.attention=varlen", "run.device=cpu"]
    )
    with pytest.raises(ValueError, match=r"run\.attention=varlen cannot be used here: it needs CUDA"):
        Form(recipe, 1, real=False)


def test_the_plain_form_has_every_switch_at_its_plainest():
    run = plain(load_recipe("small_photos", [*SMALL, "data={name: scenes}"])).run
    assert (run.logits, run.tokens, run.compile, run.checkpointing) == ("whole", "all", "none", "none")
    assert (run.attention, run.keep_memory) == ("sdpa", False)


def test_the_plain_form_of_a_network_with_its_own_attention_leaves_it():
    recipe = load_recipe("small_photos", [*SMALL, "data={name: scenes}"])
    model = {"name": "timm_vit", "model": "vit_tiny_patch16_224", "size": 48}
    assert plain(replace(recipe, backbone=model)).run.attention == "auto"


def test_a_share_in_fp16_is_one_of_the_rate_in_fp16():
    form = Form(
        load_recipe(
            "small_photos",
            [*SMALL, "data={name: scenes}", "optim.batch=2", "run.keep_memory=false", "run.precision=fp16"],
        ),
        1,
        real=False,
    )
    form.warm_up()
    form.round()
    report = form.report()
    flops = report.model_flops / report.seconds[0]
    assert report.share_of_matmul == pytest.approx(flops / report.matmul_fp16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench"], "There is: step, data, attention, eval"),
        (["bench", "stp"], "Did you mean 'step'"),
        (["bench", "step", "batch=x"], "batch: 'x' is not a whole number"),
        (["bench", "step", "input=dta"], "Did you mean 'data'?"),
        (["bench", "step", "bacth=3"], "there is no key 'bacth'. Did you mean 'batch'?"),
        (["bench", "step", "roundz=3"], "Did you mean 'rounds'?"),
        (["bench", "step", "inputt=data"], "Did you mean 'input'?"),
        (["bench", "step", "recpie=scenes_cpu"], "Did you mean 'recipe'?"),
        (["bench", "step", "bakbone.width=3"], "Did you mean 'backbone'?"),
        (["bench", "step", "optim.bacth=3"], "Did you mean 'batch'?"),
        (["bench", "step", "optim.batch=3"], "bench takes the number of images as batch=3"),
        (["bench", "eval", "input=data"], "input=data: bench eval reads no images"),
        (["bench", "attention", "input=data"], "images are read by: bench step, bench data."),
        (["bench", "eval", "data.path=x"], "data.path=x: bench eval reads no images"),
        (["bench", "data", "data.path=x"], "data.path=x: bench data reads the recipe's data with input=data"),
        (["bench", "data", "input=data", "data.path=/no/such"], "/no/such"),
        (
            ["bench", "step", "small_photos", "recipe=scenes_cpu"],
            "are given: small_photos, scenes_cpu.",
        ),
        (["bench", "data", "--against", "plain"], "only with `dinokit bench step`"),
        (["bench", "step", "--against", "plane"], "--against takes `plain`, `silent` or KEY=VALUE"),
        (["bench", "step", "--against", "losses.kolo=null"], "Did you mean 'koleo'"),
        (["bench", "step", "--against", "rounds=2"], "give rounds=2 outside of --against"),
        (["bench", "step", "--against", "masks=null,batch=2"], "--against batch=2: this is a key of bench"),
        (["bench", "step", "--against", "input=data"], "give input=data outside of --against"),
        (["bench", "step", "--against", "recipe=scenes_cpu"], "give recipe=scenes_cpu outside of --against"),
        (["bench", "step", "smal_photos"], "Did you mean 'small_photos'"),
    ],
)
def test_a_typo_is_answered(words, message, capsys):
    assert main(words) == (3 if message == "/no/such" else 2)
    assert message in capsys.readouterr().err
