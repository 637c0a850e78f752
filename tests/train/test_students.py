"""Several students of one frozen teacher learn together what each learns alone. Real processes, over gloo."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from dinokit.commands import Command
from dinokit.commands import train as train_command
from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.train import trainer
from dinokit.train.checkpoint import Checkpoints, newest, readable
from dinokit.train.students import common_step
from dinokit.weights import load_backbone, save_backbone

STUDENTS = """
students:
  small: {}
  large: {share: SHARE, backbone: {width: 36, heads: 3}, optim: {lr: 2e-3}}
"""
# Neighbours of KoLeo are searched in a process, so they depend on the number of processes alone.
DISTIL = ("masks=null", "backbone.drop_path=0.1")


def train(recipe):
    return trainer.train(recipe, registry.build("data.sources", recipe.data))


@pytest.fixture
def run(tiny):
    """A run that trained a wider backbone with its heads, and left a checkpoint."""
    return train(tiny("run", "backbone.width=48", "backbone.heads=3", "optim.steps=3"))


@pytest.fixture
def backbone(tiny, tmp_path):
    """The file of a wider backbone, which has no heads."""
    recipe = tiny("x")
    section = {**recipe.backbone, "width": 48, "heads": 3}
    torch.manual_seed(5)
    model = registry.build("models", section)
    model.input = type(model.input)(32, tuple(recipe.crops.mean), tuple(recipe.crops.std))
    save_backbone(tmp_path / "teacher.safetensors", model, section)
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def job(recipe_file, photos, tmp_path):
    """job(teacher, share): a recipe of two students, the second with this share, and overrides."""

    def make(teacher, share):
        path = tmp_path / "students.yaml"
        path.write_text(recipe_file.read_text() + STUDENTS.replace("SHARE", str(share)))
        return str(path), [f"data.path={photos}", f"teacher.frozen={teacher}", *DISTIL]

    return make


def assert_nearly_the_same(records, weights, one, two):
    for a, b in zip(records(one), records(two), strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=3e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture
def compare(job, together, records, weights, tmp_path):
    """compare(teacher, share, words, of_job): a job of two students is nearly the same as each of them alone.

    `words` are overrides; `of_job` those of the job only.
    """

    def run(teacher, share, words=(), of_job=()):
        file, overrides = job(teacher, share)
        overrides += words
        together(1 + share, "train_students", file, [*overrides, *of_job, f"run.out={tmp_path / 'job'}"])
        for name, world in (("small", 1), ("large", share)):
            out = tmp_path / f"alone_{name}"
            alone = [*overrides, f"run.out={out}", f"student={name}"]
            if world == 1:
                train(load_recipe(file, alone))
            else:
                together(world, "train", file, alone)
            assert_nearly_the_same(
                records, weights, tmp_path / "job" / "students" / name, out / "students" / name
            )
        return tmp_path / "job"

    return run


def test_two_students_learn_what_each_learns_alone(compare, run):
    folder = compare(run, 1)
    for name, width in (("small", 24), ("large", 36)):
        assert load_backbone(folder / "students" / name).width == width
        read = load_recipe(folder / "students" / name / "recipe.yaml", of_run=True)
        assert (read.name, read.teacher.frozen) == (f"students_{name}", str(run))
    with pytest.raises(LookupError, match=r"that is: .*students/large, .*students/small\."):
        load_backbone(folder)


@pytest.mark.slow
def test_a_student_on_two_processes_of_three_learns_what_it_learns_alone_on_two(compare, backbone):
    """Three processes cannot divide a batch of 4 equally; the teacher has no heads; FSDP in the job."""
    compare(backbone, 2, ["optim.batch=4"], ["run.parallel=fsdp"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_students_on_two_gpus_learn_what_each_learns_alone(compare, run):
    compare(run, 1, ["run.device=cuda"])


@pytest.mark.parametrize(
    ("small", "large", "step"),
    [
        (([], False), ([], False), 0),  # a new job
        (([2, 4], True), ([2], True), 2),  # killed while the second was written
        (([2], True), ([], True), 0),  # killed while the first was written
        (([2], True), ([], False), None),  # another student was added, or its folder lost
        (([2], True), ([4], True), None),
        (([2, 4], True), ([], True), None),
    ],
)
def test_students_resume_from_a_step_of_all_or_say_why_not(small, large, step):
    everyone = {"small": small, "large": large}
    if step is not None:
        assert common_step(everyone, Path("job")) == step
    else:
        with pytest.raises(ValueError, match=r"no checkpoint of the same step: small \[.*run\.resume=never"):
            common_step(everyone, Path("job"))


def test_minutes_are_refused_for_a_recipe_of_students_as_for_any(job):
    file, overrides = job("teacher", 1)
    with pytest.raises(ValueError, match=r"minutes=3 is for a run without a recipe"):
        train_command.run(Command([file], [*overrides, "minutes=3"]))


def test_checkpoints_that_others_lack_are_removed_and_damaged_older_ones_skipped(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": torch.ones(1)}, {})
        checkpoints.finish()
        (checkpoints.folder / "step_0000002" / "complete.json").write_text("{")
        checkpoints.remove_after(3)
    assert [saved.step for saved in readable(checkpoints.folder)] == [3, 1]


@pytest.mark.slow
def test_students_go_on_bit_for_bit_from_a_step_that_all_have_saved(job, together, run, same_run, tmp_path):
    file, overrides = job(run, 1)
    whole, broken = (f"run.out={tmp_path / name}" for name in ("whole", "broken"))
    together(2, "train_students", file, [*overrides, whole])
    together(2, "kill_one_student", file, [*overrides, broken], status=(1, 2, -signal.SIGKILL))
    folders = [tmp_path / "broken" / "students" / name for name in ("small", "large")]
    shutil.rmtree(folders[1] / "checkpoints" / "step_0000004", ignore_errors=True)  # as if killed before
    assert [newest(folder / "checkpoints").step for folder in folders] == [4, 2]
    together(2, "train_students", file, [*overrides, broken])
    for folder in folders:
        same_run(tmp_path / "whole" / "students" / folder.name, folder)


OF_LARGE = "This is process 1, of student large. Students, by process: small 0; large 1."


@pytest.mark.parametrize(
    ("scenario", "words", "said"),
    [
        ("fail_in_one", [], "RuntimeError: a bug in one process"),
        ("train_students", ["students.large.optim.lr=1e30", "run.max_skipped=1"], "in a row were skipped"),
    ],
)
def test_a_student_that_fails_ends_all_with_a_message_that_names_it(
    job, together, backbone, tmp_path, scenario, words, said
):
    """One process raises; or the weights of one student become so large that its losses are not finite."""
    file, overrides = job(backbone, 1)
    more = ["train_students"] if scenario == "fail_in_one" else []
    output = together(
        2, scenario, file, [*overrides, *words, f"run.out={tmp_path / 'job'}"], *more, status=(1, 2)
    )
    assert said in output
    assert OF_LARGE in output
    assert "of student small" not in output  # what follows from it is not reported
    folder = tmp_path / "job" / "students"
    assert "skipped" not in (folder / "small" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_students_that_are_stopped_save_each_and_go_on_bit_for_bit(
    job, together, backbone, same_run, tmp_path
):
    file, overrides = job(backbone, 1)
    whole, broken = (f"run.out={tmp_path / name}" for name in ("whole", "broken"))
    together(2, "train_students", file, [*overrides, whole])
    rarely = [*overrides, "run.checkpoint_every=100", broken]
    output = together(2, "stop_after", file, rarely, 3, "train_students", status=(130,))
    assert "Error" not in output
    folders = [tmp_path / "broken" / "students" / name for name in ("small", "large")]
    assert [newest(folder / "checkpoints").step for folder in folders] == [3, 3]
    together(2, "train_students", file, [*overrides, broken])
    for folder in folders:
        same_run(tmp_path / "whole" / "students" / folder.name, folder)
