"""dinokit bench, typed: every kind, on a small network."""

import json
import multiprocessing
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from dinokit.__main__ import main
from dinokit.bench.step import bench_steps, model_flops, plain
from dinokit.config import load_recipe
from dinokit.data.loader import loader
from dinokit.data.sources.scenes import Config, build
from dinokit.train.loop import block_masks
from dinokit.train.student_teacher import StudentTeacher

SMALL = [
    "backbone.width=24", "backbone.depth=2", "backbone.heads=2", "backbone.size=48", "crops.globals.size=48",
    "crops.locals.size=16", "crops.locals.count=2", "heads.cls.prototypes=64", "heads.cls.hidden=16",
    "heads.cls.bottleneck=8", "run.precision=fp32", "run.workers=0",
]  # fmt: skip


def printed(capsys, *words):
    assert main(["bench", *words, *SMALL, "batch=2", "rounds=2", "--json", "--traceback"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.slow
def test_a_step_is_measured_beside_its_plain_form(capsys):
    found = printed(capsys, "step", "--against", "plain")
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


def test_whatever_goes_wrong_in_the_process_is_told():
    recipe = load_recipe("small_photos", [*SMALL, "data={name: scenes}", "run.device=cpu"])
    broken = replace(recipe, run=replace(recipe.run, seed=None))
    with pytest.raises(TypeError, match="NoneType"):
        bench_steps([broken], 1, real=False)


def test_the_data_path_is_measured_part_by_part(capsys):
    rates = printed(capsys, "data")["images_per_second"]
    assert rates.keys() == {"decode", "cut", "colour", "decode and cut", "all"}
    assert rates["all"] < rates["decode and cut"] < rates["decode"] * 1.5


def test_attention_and_frozen_features_are_measured(capsys):
    found = printed(capsys, "attention")
    assert found["milliseconds"]["sdpa"] > 0
    assert found["rows"] == 2 * 2 * 10 + 2 * 2 * 2
    assert printed(capsys, "eval")["images_per_second"] > 0


def test_flops_counted_without_data_are_those_of_a_real_step():
    recipe = load_recipe("small_photos", [*SMALL, "data={name: scenes}", "optim.batch=2", "run.logits=whole"])
    model = StudentTeacher(recipe).train()
    masks = block_masks(recipe, model.student.backbone)
    batches = loader(
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
        bench_steps([recipe], 1, real=False)


def test_the_plain_form_has_nothing_that_is_there_for_speed():
    run = plain(load_recipe("small_photos", [*SMALL, "data={name: scenes}"])).run
    assert (run.logits, run.tokens, run.compile, run.checkpointing) == ("whole", "all", "none", "none")
    assert not run.keep_memory


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench"], "There is: step, data, attention, eval"),
        (["bench", "stp"], "Did you mean 'step'"),
        (["bench", "step", "batch=x"], "batch=x: it must be a whole number"),
        (["bench", "step", "input=real"], "input=real: there is: synthetic, data"),
        (["bench", "data", "--against", "plain"], "only with `dinokit bench step`"),
        (["bench", "step", "smal_photos"], "Did you mean 'small_photos'"),
    ],
)
def test_a_typo_is_answered(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err
