"""Whole runs: exact resumption, accumulation, and what bad input gets."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinokit import viz
from dinokit.config import registry
from dinokit.data.loader import training_loader
from dinokit.runtime.signals import STOP_SIGNALS, Stopped
from dinokit.train import trainer
from dinokit.train.checkpoint import latest
from dinokit.train.networks import block_masks
from dinokit.train.step import Step
from dinokit.train.trainer import Evaluator, TooManyUnreadableError, TrainingError


def train(recipe, evaluators=()):
    return trainer.train(recipe, registry.build("data.sources", recipe.data), evaluators)


def test_a_run_leaves_what_it_promises(tiny, records):
    out = train(tiny("a"))
    have = {p.name for p in out.iterdir()}
    assert have == {
        "recipe.yaml",
        "env.json",
        "metrics.jsonl",
        "run.log",
        "checkpoints",
        ".checkpointed",
        "teacher.safetensors",
    }
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step_0000004", "step_0000006"]
    assert [r["step"] for r in records(out)] == [1, 2, 3, 4, 5, 6]
    assert {"dino", "ibot", "koleo", "lr", "momentum", "teacher_temp"} <= records(out)[0].keys()
    assert json.loads((out / "env.json").read_text())["packages"]["torch"] in torch.__version__


def test_the_teacher_moves_and_the_losses_do_too(tiny, records, weights):
    recipe = tiny("a")
    torch.manual_seed(recipe.run.seed)
    start = Step(recipe, torch.device("cpu")).model.teacher.backbone.state_dict()
    out = train(recipe)
    end = weights(out)
    assert any(not torch.equal(start[k], end[k]) for k in end)
    assert len({r["dino"] for r in records(out)}) == 6


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tiny, workers, same_run):
    same_run(train(tiny("a")), train(tiny("b", f"run.workers={workers}")))


COMMAND = "from dinokit.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"


def start(recipe_file, photos, out, *overrides) -> subprocess.Popen:
    words = ["train", str(recipe_file), f"data.path={photos}", f"run.out={out}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if (out / "checkpoints" / f"step_{step:07d}").exists():
            return
        time.sleep(0.005)
    pytest.fail(f"no checkpoint of step {step}: {process.communicate()}")


LONG = ("optim.steps=30", "run.checkpoint_every=3")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_killed_run_goes_on_bit_for_bit(tiny, recipe_file, photos, tmp_path, same_run):
    whole = train(tiny("whole", *LONG))
    broken = tmp_path / "broken"
    process = start(recipe_file, photos, broken, *LONG)
    wait_for_step(process, broken, 6)
    process.kill()
    process.communicate()
    assert not (broken / "checkpoints" / "step_0000030").exists()  # it was killed on the way
    train(tiny("broken", *LONG, "run.workers=2"))
    same_run(whole, broken)


OPENING = (
    "losses.contrastive.phase=[0,0.5]", "losses.dino.phase=[0.5,1]", "losses.ibot.phase=[0.5,1]",
    "losses.koleo.phase=[0.5,1]", "heads.projector.hidden=16",
)  # fmt: skip


@pytest.mark.parametrize("name", ["contrastive", "lejepa"])
def test_a_run_that_begins_with_a_contrast_logs_the_losses_of_each_phase_and_resumes_across_it(
    tiny, records, same_run, name
):
    opening = [words.replace("contrastive", name) for words in OPENING]
    whole = train(tiny("whole", *opening, "run.keep=3", "run.log_every=4"))
    names = [{name, "dino", "ibot", "koleo"} & record.keys() for record in records(whole)]
    assert [r["step"] for r in records(whole)] == [2, 3, 4, 6]  # 3: where other losses begin
    assert names == [{name}] * 2 + [{"dino", "ibot", "koleo"}] * 2
    broken = Path(shutil.copytree(whole, whole.with_name("broken")))
    for step in (4, 6):
        shutil.rmtree(broken / "checkpoints" / f"step_{step:07d}")
    train(tiny("broken", *opening, "run.keep=3", "run.log_every=4"))
    same_run(whole, broken)


def test_in_the_opening_neither_teacher_nor_heads_are_computed(tiny):
    recipe = tiny("a", *OPENING)
    step = Step(recipe, torch.device("cpu"))
    heads = [p.clone() for p in step.model.student.dino_head.parameters()]
    projector = [p.clone() for p in step.model.student.projector.parameters()]
    step.model.teacher.read = lambda *_: pytest.fail("the teacher was computed")
    source = registry.build("data.sources", recipe.data)
    masks = block_masks(recipe, step.model.student.backbone)
    loader = training_loader(
        source, recipe.crops, masks, seed=0, start_step=0, steps=2, batch=4, rank=0, world=1,
        accumulation=1, workers=0, pin=False,
    )  # fmt: skip
    for batch in loader:
        losses = step(batch)
    assert {"contrastive", "dino", "ibot", "koleo"} & losses.keys() == {"contrastive"}
    assert all(
        torch.equal(a, b) for a, b in zip(heads, step.model.student.dino_head.parameters(), strict=True)
    )
    moved = zip(projector, step.model.student.projector.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


LATER = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR2)]


@pytest.mark.parametrize("number", [signal.SIGINT, *LATER])
def test_an_interrupted_run_saves_first_and_goes_on_bit_for_bit(
    tiny, recipe_file, photos, tmp_path, number, same_run
):
    whole = train(tiny("whole", *LONG))
    broken = tmp_path / "broken"
    process = start(recipe_file, photos, broken, *LONG, "run.checkpoint_every=1", "run.workers=1")
    wait_for_step(process, broken, 2)
    for _ in range(1 if number == signal.SIGINT else 3):  # a scheduler repeats itself
        process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "the same command resumes from here" in out
    assert ("stops after the current step; press Ctrl-C again" in err) == (number == signal.SIGINT)
    assert "Traceback" not in err
    train(tiny("broken", *LONG))
    same_run(whole, broken)


@pytest.mark.usefixtures("signals_given_back")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_with_a_stop_signal_after_its_last_step_just_ends(tiny, number, same_run):
    """What says it is the evaluator, which comes last of all that a step is followed by."""
    whole = train(tiny("whole"), [Evaluator("probe", 6, lambda _: {"x": 0.0})])
    calls = []

    def evaluate(_):
        calls.append(1)
        if len(calls) == 2:  # after step 6
            signal.raise_signal(number)
        return {"x": 0.0}

    signalled = train(tiny("signalled"), [Evaluator("probe", 6, evaluate)])
    assert {signal.getsignal(each) for each in STOP_SIGNALS} == {signal.SIG_IGN}  # a scheduler repeats itself
    assert len(calls) == 2
    assert "stopped" not in (signalled / "run.log").read_text()
    same_run(whole, signalled)


@pytest.mark.usefixtures("signals_given_back")
def test_a_signal_during_an_evaluation_stops_the_run_before_the_next_step(tiny, same_run):
    whole = train(tiny("whole"), [Evaluator("probe", 3, lambda _: {"x": 0.0})])
    calls = []

    def evaluate(_):
        calls.append(1)
        if len(calls) == 2:  # after step 3, which has no checkpoint of its own
            signal.raise_signal(signal.SIGTERM)
        return {"x": 0.0}

    stopped = tiny("stopped")
    with pytest.raises(Stopped):
        train(stopped, [Evaluator("probe", 3, evaluate)])
    assert latest(Path(stopped.run.out) / "checkpoints").step == 3
    same_run(whole, train(stopped, [Evaluator("probe", 3, evaluate)]))
    assert len(calls) == 3  # that of step 3 was complete


def test_the_teachers_to_keep_stay_beside_the_last_one(tiny, weights):
    out = train(tiny("a", "run.keep_every=4", "run.checkpoint_every=2"))
    assert [path.name for path in (out / "teachers").iterdir()] == ["step_0000004.safetensors"]
    saved = load_file(out / "teachers/step_0000004.safetensors")
    assert saved.keys() == weights(out).keys()
    assert not all(torch.equal(saved[key], value) for key, value in weights(out).items())
    out = train(tiny("b", "run.keep_every=3", "run.checkpoint_every=3"))  # the last step is one of them
    saved = load_file(out / "teachers/step_0000006.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in weights(out).items())


def test_a_finished_run_is_not_run_again(tiny, records):
    out = train(tiny("a"))
    before = records(out)
    train(tiny("a"))
    assert records(out) == before


def test_another_recipe_does_not_touch_a_run(tiny, weights):
    out = train(tiny("a"))
    before = weights(out)
    with pytest.raises(
        ValueError, match=r"run of another recipe: optim.lr was 0.001, now 0.002.*another run.out"
    ):
        train(tiny("a", "optim.lr=2e-3"))
    assert all(torch.equal(before[k], v) for k, v in weights(out).items())


def test_a_folder_with_other_things_is_left_alone(tiny, photos):
    with pytest.raises(ValueError, match="not empty and is not a run"):
        train(tiny("photos"))
    assert len(list(photos.iterdir())) == 10


def test_pictures_without_files_cannot_be_decoded_reduced_and_leave_no_folder_behind(tiny, tmp_path):
    recipe = tiny("a", "crops.decode=reduced")
    with pytest.raises(ValueError, match="decodes JPEG files"):
        trainer.train(recipe, registry.build("data.sources", {"name": "scenes", "size": 32, "count": 10}))
    assert not (tmp_path / "a").exists()


def test_parts_of_a_batch_are_the_whole_when_nothing_is_compared(tiny, records, weights):
    """With centring and without KoLeo every statistic is a sum, so accumulation is exact."""
    overrides = ("losses.dino.targets=centering", "losses.ibot.targets=centering", "losses.koleo=null",
                 "backbone.drop_path=0.0")  # fmt: skip
    whole, parts = train(tiny("a", *overrides)), train(tiny("b", *overrides, "run.accumulate=2"))
    one, two = weights(whole), weights(parts)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)
    for a, b in zip(records(whole), records(parts), strict=True):
        assert a["dino"] == pytest.approx(b["dino"], rel=1e-4)
        assert a["ibot"] == pytest.approx(b["ibot"], rel=1e-4)


def test_bf16_trains_nearly_the_same(tiny, records):
    full, half = train(tiny("a")), train(tiny("b", "run.precision=bf16"))
    for a, b in zip(records(full), records(half), strict=True):
        assert a["dino"] == pytest.approx(b["dino"], rel=0.05)


def test_fp16_skips_overflowing_steps_and_then_trains(tiny, records, weights):
    recipe = tiny("a", "run.precision=fp16", "optim.steps=30")
    step = Step(recipe, torch.device("cpu"))
    assert step.scaler.get_scale() > 1000
    out = train(recipe)
    done = records(out)
    assert done[0]["grad_dino_head"] is None  # these heads start with gradients of thousands
    assert math.isfinite(done[-1]["grad_dino_head"])
    assert all(math.isfinite(r["dino"]) for r in done)
    assert all(v.isfinite().all() for v in weights(out).values())


def test_an_evaluator_is_called_at_both_ends_and_when_due_and_sees_the_teacher(tiny, records):
    seen = []

    def evaluate(backbone):
        seen.append(backbone.training)
        return {"answer": 42.0}

    out = train(tiny("a"), [Evaluator("deep", 4, evaluate)])
    assert [r["step"] for r in records(out) if "deep/answer" in r] == [0, 4, 6]
    assert seen == [False] * 3


def test_an_evaluation_that_was_cut_short_is_done_again_and_costs_no_step(tiny, records):
    calls = []

    def evaluate(backbone):
        calls.append(1)
        if len(calls) == 3:  # after step 4
            raise KeyboardInterrupt
        return {"norm": float(len(calls))}

    with pytest.raises(KeyboardInterrupt):
        train(tiny("a"), [Evaluator("probe", 2, evaluate)])
    assert latest(Path(tiny("a").run.out) / "checkpoints").step == 4
    out = train(tiny("a"), [Evaluator("probe", 2, evaluate)])
    evaluated = {each["step"]: each["probe/norm"] for each in records(out) if "probe/norm" in each}
    assert evaluated == {0: 1, 2: 2, 4: 4, 6: 5}
    train(tiny("a"), [Evaluator("probe", 2, evaluate)])
    assert len(calls) == 5


def test_a_run_does_not_go_on_with_other_images(tiny, photos, cut_short):
    cut_short(tiny("a"))
    Image.new("RGB", (48, 48)).save(photos / "new.png")
    with pytest.raises(ValueError, match=r"number of images was 10 at .*, and now is 11.*run.out="):
        train(tiny("a"))
    (photos / "new.png").unlink()
    (photos / "0.png").rename(photos / "00.png")
    with pytest.raises(ValueError, match=r"order of images was .*0.png"):
        train(tiny("a"))


@pytest.mark.parametrize("way", ["replaced", "swapped", "copied"])
def test_a_run_sees_that_images_changed_under_their_names(tiny, photos, cut_short, records, way):
    cut_short(tiny("a"))
    files = sorted(photos.iterdir())
    contents = [file.read_bytes() for file in files]
    if way == "replaced":
        Image.new("RGB", (48, 48)).save(files[-1])
    for file, content in zip(files, contents, strict=True) if way == "copied" else ():
        file.write_bytes(content)  # only the times are new
    if way == "swapped":
        for file, content in zip(files, reversed(contents), strict=True):
            file.write_bytes(content)
    if way != "copied":
        with pytest.raises(ValueError, match=r"(sizes|contents) of images was .*run\.images=changed"):
            train(tiny("a"))
    out = train(tiny("a", *(["run.images=changed"] if way != "copied" else [])))
    assert "images changed since the checkpoint: " in (out / "run.log").read_text()
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4, 5, 6]


def test_evaluation_changes_nothing_of_the_run(tiny, weights):
    quiet = train(tiny("a"))
    torch_user = Evaluator("noisy", 1, lambda _: {"x": torch.rand(3).sum().item()})
    evaluated = train(tiny("b"), [torch_user])
    assert all(torch.equal(weights(quiet)[k], v) for k, v in weights(evaluated).items())


def test_a_loss_that_is_not_finite_is_named_and_the_last_good_checkpoint_stays(tiny):
    with pytest.raises(
        TrainingError,
        match=r"'(dino|ibot|koleo|grad_\w+)' became (nan|inf) in step [3-9].*step_0000002.*optim\.lr",
    ):
        train(
            tiny("a", "optim.lr=1e30", "optim.warmup=1", "optim.clip=0", "run.log_every=2", "optim.steps=20")
        )
    out = Path(tiny("a").run.out)
    (file,) = (out / "checkpoints" / "step_0000002").glob("*.safetensors")
    assert all(v.isfinite().all() for v in load_file(file).values())


def test_an_unreadable_image_is_named_once_and_the_run_goes_on(tiny, photos):
    whole = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(whole[: len(whole) // 2])
    out = train(tiny("a", "run.max_unreadable=0.2"))
    assert (out / "run.log").read_text().count("3.png") == 1
    with pytest.raises(TooManyUnreadableError, match=r"1 of 10 .*3\.png.*run\.max_unreadable=0\.2"):
        train(tiny("b"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["crops.globals.size=36"],
            "crops.globals.size=36 is no multiple of .* 8 pixels; the nearest that is: 32",
        ),
        (["crops.locals.size=15"], "crops.locals.size=15"),
        (["crops.globals.size=16"], "masks"),
        (["backbone.channels=4"], "backbone.channels=4, but crops.mean .* 3 channels"),
        (["backbone.mask_token=false"], "backbone.mask_token=true"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(tiny, overrides, message):
    recipe = tiny("a", *overrides)
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert not (Path(recipe.run.out) / "checkpoints").exists()


def test_masks_fit_the_global_crops(tiny):
    recipe = tiny("a")
    step = Step(recipe, torch.device("cpu"))
    masks = block_masks(recipe, step.model.student.backbone)
    assert masks.grid == (4, 4)


def test_trackers_get_the_pictures_of_every_evaluation(tiny, tmp_path):
    recipe = tiny("run", "run.log=[tensorboard]")
    source = registry.build("data.sources", recipe.data)
    basis, bases = tmp_path / "run" / viz.BASIS, []

    def evaluate(backbone):
        bases.append(basis.read_bytes() if basis.exists() else None)
        return {"score": 1.0}

    trainer.train(recipe, source, [Evaluator("mine", 3, evaluate)], partial(viz.progress, recipe, source))
    assert bases[0] is None
    assert bases[1] == bases[2] == basis.read_bytes()  # the colours are those of the first picture
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [image.step for image in found.Images("patches")] == [0, 3, 6]
    assert [event.step for event in found.Scalars("dino")] == [1, 2, 3, 4, 5, 6]
