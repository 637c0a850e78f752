"""Steps whose losses or gradients are not finite are skipped, counted, and repeated on request."""

import json
import math
from pathlib import Path

import pytest
import torch

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.runtime.signals import Stopped
from dinokit.train import trainer
from dinokit.train.checkpoint import newest
from dinokit.train.not_finite import GRADIENT, SkippedSteps
from dinokit.train.step import SKIPPED, Step
from dinokit.train.trainer import TrainingError

HERE = Path(__file__).parent
CENTRED = ("losses.dino.targets=centering", "losses.ibot.targets=centering")


@pytest.fixture
def arrays(tmp_path, recipe_file, monkeypatch):
    """load(name, *overrides): a run on own_images.floats."""
    monkeypatch.syspath_prepend(HERE)
    recipe_file.write_text(recipe_file.read_text().replace('folder, path: "???"', "own_images.floats"))
    return lambda out, *given: load_recipe(recipe_file, [f"run.out={tmp_path / out}", *given])


def train(recipe):
    return trainer.train(recipe, registry.build("data.sources", recipe.data))


def batches_of(recipe):
    source = registry.build("data.sources", recipe.data)
    return source, list(Step(recipe, torch.device("cpu")).loader(source, 0, recipe.optim.steps))


def broken_steps(recipe):
    """The steps, from 1, whose crops have pixels that are no numbers."""
    _, batches = batches_of(recipe)
    return [batch.step + 1 for batch in batches if not batch.global_crops.float().isfinite().all()]


def everything(step):
    """All that a step changes but the moving average: student, statistics of losses, optimiser."""
    tensors, scaler = step.state()
    own = {name: x for name, x in tensors.items() if not name.startswith("model.teacher.")}
    return {name: x.clone() for name, x in own.items()}, scaler


@pytest.mark.parametrize("given", [(), CENTRED, ("run.accumulate=2", "losses.koleo=null")], ids=str)
def test_a_step_with_pixels_that_are_no_numbers_changes_nothing(arrays, given):
    recipe = arrays("a", *given, "optim.warmup=0")  # every step moves
    _, batches = batches_of(recipe)
    step, skipped = Step(recipe, torch.device("cpu")), []
    for batch in batches:
        before = everything(step)[0]
        values = step(batch)
        after = everything(step)[0]
        if values[SKIPPED]:
            skipped.append(batch.step + 1)
            assert before.keys() <= after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
        else:
            assert not torch.equal(before["model.student.dino_head.last_layer.weight_v"],
                                   after["model.student.dino_head.last_layer.weight_v"])  # fmt: skip
        assert all(x.isfinite().all() for x in after.values())
    assert skipped == broken_steps(recipe)
    assert 0 < len(skipped) < 6


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_enough_though_its_own_gradient_is(tiny, value):
    recipe = tiny("a")
    _, (first, *_) = batches_of(recipe)
    step = Step(recipe, torch.device("cpu"))
    plain = step.replica.forward
    step.replica.forward = lambda *given: {
        name: loss + (value if name == "koleo" else 0) for name, loss in plain(*given).items()
    }
    before = everything(step)[0]
    assert step(first)[SKIPPED] == 1
    assert all(torch.equal(x, everything(step)[0][name]) for name, x in before.items())


def test_a_gradient_that_is_not_finite_is_enough_though_the_losses_are(tiny):
    recipe = tiny("a")
    _, (first, *_) = batches_of(recipe)
    step = Step(recipe, torch.device("cpu"))
    next(step.model.student.parameters()).register_hook(lambda gradient: gradient * math.inf)
    values = step(first)
    assert values[SKIPPED] == 1
    assert all(values[name].isfinite() for name in recipe.losses)


def test_the_flag_is_read_with_the_losses_and_skipped_steps_are_recorded_with_their_images(arrays, records):
    recipe = arrays("a", "run.log_every=6", "run.checkpoint_every=6")
    out = train(recipe)
    *skipped, last = records(out)
    broken = broken_steps(recipe)
    assert [record["step"] for record in skipped] == broken
    assert last["skipped_steps"] == len(broken)
    assert all(math.isfinite(last[name]) for name in ("dino", "ibot", "koleo", "grad_backbone"))
    for record in skipped:
        found = record["skipped"]
        assert found["seed"] == 0
        assert found["not_finite"][:2] == ["dino", "ibot"]
        assert len(found["images"]) == 4
        assert [name for name in found["images"] if name.endswith("07.npy")]
    log = (out / "run.log").read_text()
    assert f"step {broken[0]} was skipped" in log
    assert f"replay={broken[0]}" in log


def test_the_mean_that_is_logged_is_that_of_the_steps_that_were_taken(arrays, records):
    each = {r["step"]: r for r in records(train(arrays("a"))) if "lr" in r}
    [*_, together] = records(train(arrays("b", "run.log_every=6", "run.checkpoint_every=6")))
    taken = [r["dino"] for r in each.values() if r["dino"] is not None]
    assert len(taken) == 6 - together["skipped_steps"]
    assert together["dino"] == pytest.approx(sum(taken) / len(taken), rel=1e-5)


@pytest.mark.parametrize("given", [(), CENTRED], ids=str)
def test_a_run_with_skipped_steps_resumes_exactly(arrays, same_run, cut_short, given):
    given = (*given, "run.checkpoint_every=1")  # not after a skipped step
    whole = train(arrays("whole", *given))
    broken = arrays("broken", *given)
    cut_short(broken)
    same_run(whole, train(broken))
    saved = [newest(out / "checkpoints").values["skipped"] for out in (whole, train(broken))]
    assert saved[0] == saved[1]
    assert saved[0][0] > 0


def test_the_count_in_a_row_survives_a_stop(arrays):
    """Each batch has the bad image. A callback stops the run after step 3, which writes a checkpoint."""
    recipe = arrays("a", "optim.batch=12", "run.max_skipped=4")
    source = registry.build("data.sources", recipe.data)
    with pytest.raises(Stopped):
        trainer.train(recipe, source, callbacks=[lambda step, values, backbone: step == 2])
    assert newest(Path(recipe.run.out) / "checkpoints").values["skipped"] == [3, 3]
    with pytest.raises(TrainingError, match=r"in step 5; 5 steps in a row .*step_0000003"):
        train(recipe)


def test_too_many_in_a_row_end_the_program_with_status_4_and_the_way_out(arrays, tmp_path, capsys):
    arrays("a")
    given = [f"run.out={tmp_path / 'a'}", "run.report=false", "optim.batch=12", "run.max_skipped=2"]
    assert main(["train", str(tmp_path / "tiny.yaml"), *given]) == 4
    error = capsys.readouterr().err
    assert "'dino' became nan in step 3; 3 steps in a row were skipped, and run.max_skipped=2." in error
    assert "No checkpoint was written yet." in error  # none is written among skipped steps
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [1, 2, 3]


def test_a_run_that_took_no_step_has_not_finished(arrays, tmp_path, capsys):
    """Each batch has the bad image, and all steps are fewer than may be skipped in a row."""
    arrays("a")
    given = [f"run.out={tmp_path / 'a'}", "optim.batch=12", "optim.steps=3", "optim.warmup=0"]
    assert main(["train", str(tmp_path / "tiny.yaml"), *given]) == 4
    shown = capsys.readouterr()
    assert (
        "'dino' became nan in step 3; all steps of the run (3) were skipped, so nothing was learnt"
        in shown.err
    )
    assert "finished" not in shown.out + (tmp_path / "a/run.log").read_text()
    assert not (tmp_path / "a/teacher.safetensors").exists()


def test_overflows_of_fp16_are_no_fault_unless_no_step_was_taken(tiny):
    recipe = tiny("a", "optim.steps=3", "optim.warmup=0", "optim.batch=4")
    names = [*recipe.losses, f"{GRADIENT}backbone", SKIPPED]
    taken, overflow = [[1.0] * (len(names) - 2) + last for last in ([1.0, 0.0], [math.inf, 1.0])]
    for rows, ends in (([overflow] * 3, True), ([overflow, taken, overflow], False)):
        counted = SkippedSteps(recipe, torch.amp.GradScaler("cpu", init_scale=1024.0))
        for step, row in enumerate(rows, 1):
            assert not counted.end_run(step - 1)
            assert counted.add(torch.tensor([row]), names, step) == {}
        assert counted.end_run(3) == ends
    with_all = SkippedSteps(recipe, torch.amp.GradScaler("cpu", init_scale=1024.0))
    with_all.add(torch.tensor([overflow] * 3), names, 3)
    assert "overflowed in 3 of 3 steps and no step was taken" in with_all.message(None)


def test_zero_allows_none(arrays):
    recipe = arrays("a", "run.max_skipped=0")
    first = broken_steps(recipe)[0]
    with pytest.raises(TrainingError, match=rf"'dino' became nan in step {first}, and run.max_skipped=0"):
        train(recipe)


def test_replay_names_the_image_and_writes_nothing(arrays, capsys):
    out = train(arrays("a", "run.keep=9", "run.checkpoint_every=1"))
    last = broken_steps(arrays("a"))[-1]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main(["train", str(out / "recipe.yaml"), f"replay={last}", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["step"], found["start"], found["seed"]) == (last, last - 1, 0)
    assert {"dino", "ibot", "koleo", "grad_backbone"} <= set(found["not_finite"])
    assert [name.rsplit("/")[-1] for name in found["pixels"]] == ["07.npy"]
    assert all("07.npy" in "".join(images) for _, images in found["groups"])
    assert found["weights"] == []
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.gpu
def test_replay_on_a_gpu_names_the_image(arrays, capsys):
    recipe = arrays("a", "run.device=cuda", "run.precision=bf16", "run.keep=9", "run.checkpoint_every=1")
    out, last = train(recipe), broken_steps(arrays("a"))[-1]
    capsys.readouterr()
    assert main(["train", str(out / "recipe.yaml"), f"replay={last}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [name.rsplit("/")[-1] for name in found["pixels"]] == ["07.npy"]
    assert {"dino", "ibot", "koleo", "grad_backbone"} <= set(found["not_finite"])


def test_replay_of_a_sound_step_says_so_and_repeats_its_losses(tiny, records, capsys, monkeypatch):
    out = train(tiny("a"))
    seen, real = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, batch: seen.append(real(self, batch)) or seen[-1])
    assert main(["train", str(out / "recipe.yaml"), "replay=6"]) == 0
    assert "all losses and gradients are finite here" in capsys.readouterr().out
    assert len(seen) == 2  # 5 and 6, after the checkpoint of step 4
    record = records(out)[-1]
    assert {name: seen[-1][name].item() for name in recipe_losses(out)} == {
        name: record[name] for name in recipe_losses(out)
    }


def recipe_losses(out):
    return load_recipe(out / "recipe.yaml").losses


def test_replay_of_a_run_that_diverged_points_at_its_weights(tiny, records, capsys):
    recipe = tiny("a", "optim.lr=1e38", "optim.warmup=1", "optim.clip=0", "optim.steps=20")
    with pytest.raises(TrainingError, match=r"run\.max_skipped=5"):
        train(recipe)
    found = [r["step"] for r in records(Path(recipe.run.out)) if "skipped" in r]
    assert len(found) == 6
    assert main(["train", f"{recipe.run.out}/recipe.yaml", f"replay={found[-1]}"]) == 0
    assert "the run diverged earlier" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("replay=7",), "the run has the steps 1 to 6"),
        (("replay=soon",), "replay=soon: it is the number of a step"),
        (("replay=2", "optim.lr=0.5"), "needs the recipe of the run"),
    ],
)
def test_a_replay_that_cannot_be_is_refused(tiny, words, text, capsys):
    out = train(tiny("a"))
    assert main(["train", str(out / "recipe.yaml"), *words]) == 2
    assert text in capsys.readouterr().err


def test_a_replay_without_a_run_is_refused(recipe_file, photos, tmp_path, capsys):
    words = [f"data.path={photos}", f"run.out={tmp_path / 'none'}", "replay=1"]
    assert main(["train", str(recipe_file), *words]) == 2
    assert "replay=1 repeats a step of a run, and run.out=" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_processes_skip_a_step_together_though_one_alone_has_the_image(
    arrays, together, recipe_file, tmp_path, records, weights, parallel
):
    alone = arrays("alone", "losses.koleo=null")
    out = tmp_path / "two"
    together(
        2, "train", str(recipe_file), [f"run.out={out}", f"run.parallel={parallel}", "losses.koleo=null"]
    )
    assert [r["step"] for r in records(out) if "skipped" in r] == broken_steps(alone)
    assert all(x.isfinite().all() for x in weights(out).values())
