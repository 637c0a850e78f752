"""The stages of DINOv3: Gram anchoring, starting from a run with its heads, drawn sizes, constant rates."""

import copy
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dinokit.config import registry
from dinokit.config.load import Optim, load_recipe
from dinokit.data.batch import TrainDataset, collate
from dinokit.data.masks import BlockMasks
from dinokit.losses.dino import dino
from dinokit.losses.gram import gram
from dinokit.losses.koleo import koleo
from dinokit.runtime.signals import Stopped
from dinokit.train import trainer
from dinokit.train.networks import block_masks, build_backbone
from dinokit.train.pretrained import init_weights
from dinokit.train.schedule import Schedules
from dinokit.train.step import Step
from dinokit.train.student_teacher import StudentTeacher, resize_patches
from dinokit.weights import load_backbone

BACKBONE = (
    "backbone: {name: dinov3, size: 32, width: 24, depth: 2, heads: 2, patch: 8, hidden: 32, ffn: swiglu, "
    "layer_scale: 1.0, registers: 2, rope_rescale: 1.0, untied_local_norm: true}"
)
# Every statistic counts over all processes, as in test_parallel.py.
SHARED = ["losses.koleo.distributed=true", "losses.koleo.group=4", "run.log_every=2"]


@pytest.fixture
def v3_file(recipe_file, tmp_path):
    path = tmp_path / "v3.yaml"
    lines = recipe_file.read_text().splitlines()
    path.write_text("\n".join(BACKBONE if line.startswith("backbone:") else line for line in lines))
    return path


@pytest.fixture
def v3(v3_file, photos, tmp_path):
    """load(out, *overrides): the recipe of a run of a small dinov3."""

    def load(out, *overrides):
        return load_recipe(v3_file, [f"data.path={photos}", f"run.out={tmp_path / out}", *overrides])

    return load


def train(recipe):
    return trainer.train(recipe, registry.build("data.sources", recipe.data))


def stage_two(first):
    return [
        f"teacher.start={first}", f"teacher.gram.weights={first}", "losses.gram.weight=2",
        "losses.gram.ramp=3", "crops.gram_size=64", "teacher.gram.refresh_from=3",
        "teacher.gram.refresh_every=2", "teacher.gram.refreshes=1", "optim.schedule=constant",
        "losses.dino.local_weight=0.5",
    ]  # fmt: skip


def step_and_batch(recipe):
    torch.manual_seed(0)
    step = Step(recipe, torch.device("cpu"))
    source = registry.build("data.sources", recipe.data)
    data = TrainDataset(source, recipe.crops, block_masks(recipe, step.model.student.backbone), 0, 4)
    return step, collate([data[0, place] for place in range(4)])


def test_the_loss_compares_the_masked_student_with_the_teacher_on_its_grid(v3, tmp_path):
    recipe = v3("x", "teacher.gram.weights=unread", "losses.gram.weight=2", "crops.gram_size=64")
    step, batch = step_and_batch(recipe)
    model = step.model.eval()
    with torch.no_grad():
        for p in model.gram_teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    assert batch.gram_crops.shape == (8, 3, 64, 64)
    inputs = step.augment(batch)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.crops.mean, recipe.crops.std))
    torch.testing.assert_close(inputs.gram_crops, (batch.gram_crops / 255 - mean) / std)  # no colour
    with torch.no_grad():
        got = model(inputs, 0.05)["gram"]
        student = model.student.backbone([inputs.global_crops], [batch.masks])[0].patches  # (8, 16, D)
        large = model.gram_teacher.backbone([inputs.gram_crops], [None])[0].patches.unflatten(1, (8, 8))
        teacher = [F.interpolate(x.permute(2, 0, 1)[None], (4, 4), mode="bicubic") for x in large]
        want = gram(student, torch.cat(teacher).flatten(2).mT)
    assert batch.masks.any()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    losses = step.backward(batch)[0]
    assert losses["gram"] > 0
    assert all(p.grad is None for p in model.gram_teacher.parameters())


def test_the_moving_average_itself_can_be_the_gram_teacher(v3):
    step, batch = step_and_batch(v3("x", "teacher.gram.refreshes=3", "losses.gram.weight=1"))
    model, inputs = step.model.eval(), step.augment(batch)
    assert not hasattr(model, "gram_teacher")
    with torch.no_grad():
        got = model(inputs, 0.05)["gram"]
        student = model.student.backbone([inputs.global_crops], [batch.masks])[0].patches
        teacher = model.teacher.backbone([inputs.global_crops], [None])[0].patches
    torch.testing.assert_close(got, gram(student, teacher), rtol=1e-4, atol=1e-6)


def test_patches_are_resized_by_height_and_width():
    x = torch.randn(2, 6 * 8, 5)
    got = resize_patches(x, (48, 64), (16, 32), 8)
    want = F.interpolate(x.mT.unflatten(2, (6, 8)), (2, 4), mode="bicubic", antialias=False)
    assert torch.equal(got, want.flatten(2).mT)
    assert resize_patches(x, (48, 64), (48, 64), 8) is x


def test_the_gram_teacher_is_refreshed_at_its_steps(v3):
    more = ["teacher.gram.weights=unread", "losses.gram.weight=1", "teacher.gram.refresh_from=1"]
    step, _ = step_and_batch(v3("x", *more, "teacher.gram.refresh_every=2", "teacher.gram.refreshes=2"))
    model, copied = step.model, []
    for i in range(7):
        before = copy.deepcopy(model.gram_teacher.backbone.state_dict())
        with torch.no_grad():
            for p in model.ema.parameters():
                p.add_(0.01)
        model.refresh_gram_teacher(i)
        after, ema = model.gram_teacher.backbone.state_dict(), model.ema.backbone.state_dict()
        assert all(torch.equal(after[n], ema[n]) for n in ema) == (i in (1, 3))
        if any(not torch.equal(after[n], before[n]) for n in before):
            copied.append(i)
    assert copied == [1, 3]


def test_a_stage_starts_from_the_run_before_it_and_resumes_exactly(
    v3, tmp_path, weights, same_run, monkeypatch
):
    first = tmp_path / "first"
    train(v3("first"))
    more = stage_two(first)
    recipe = v3("whole", *more)
    model = StudentTeacher(recipe)
    fresh = copy.deepcopy(model.student.state_dict())
    init_weights(recipe, model, resumes=False)
    student, ema = model.student.state_dict(), model.ema.state_dict()
    assert all(torch.equal(student[name], ema[name]) for name in student)
    trained, anchored = weights(first), model.gram_teacher.backbone.state_dict()
    assert all(torch.equal(trained[name], student[f"backbone.{name}"]) for name in trained)
    assert all(torch.equal(trained[name], anchored[name]) for name in trained)
    heads = [name for name in student if "mlp.0.weight" in name and not name.startswith("backbone")]
    assert heads
    assert not any(torch.equal(student[name], fresh[name]) for name in heads)
    train(recipe)
    real, calls = Step.__call__, []

    def stopping(self, batch):
        calls.append(batch.step)
        out = real(self, batch)
        if batch.step == 3:  # after the only refresh
            signal.raise_signal(signal.SIGTERM)
        return out

    monkeypatch.setattr(Step, "__call__", stopping)
    with pytest.raises(Stopped):
        train(v3("parts", *more))
    monkeypatch.setattr(Step, "__call__", real)
    first.rename(tmp_path / "gone")  # a resumed run no longer needs it
    train(v3("parts", *more))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_start_that_does_not_fit_is_refused(v3, tmp_path):
    train(v3("first", "optim.steps=3", "optim.warmup=1"))
    start = f"teacher.start={tmp_path / 'first'}"
    with pytest.raises(
        ValueError, match=r"another architecture than this recipe: \d+ tensors differ, such as"
    ):
        train(v3("x", start, "heads.cls.prototypes=16"))
    with pytest.raises(LookupError, match="is no folder of a run with a checkpoint"):
        train(v3("x", "teacher.start=nowhere"))
    with pytest.raises(ValueError, match=r"does not go with backbone\.weights"):
        v3("x", start, "backbone.weights=y")


@pytest.mark.slow
def test_two_processes_are_one(v3, v3_file, photos, together, records, weights, tmp_path):
    train(v3("first", *SHARED))
    more = [*SHARED, *stage_two(tmp_path / "first")]
    train(v3("one", *more))
    runs = [
        [f"data.path={photos}", f"run.out={tmp_path / kind}", *more, f"run.parallel={kind}"]
        for kind in ("ddp", "fsdp")
    ]
    together(2, "several_runs", str(v3_file), runs)
    own = {"feature_rank", "head_spread", "brightness_agreement", "prototypes_used", "crop_agreement"}
    for kind in ("ddp", "fsdp"):
        for a, b in zip(records(tmp_path / "one"), records(tmp_path / kind), strict=True):
            a, b = ({key: row[key] for key in row if key not in own} for row in (a, b))
            assert a == pytest.approx(b, rel=2e-4), kind
        a, b = weights(tmp_path / "one"), weights(tmp_path / kind)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize(("world", "group"), [(2, 3), pytest.param(4, 6, marks=pytest.mark.slow)])
def test_neighbours_are_searched_in_the_group_of_neighbouring_processes(together, tmp_path, world, group):
    """The mean over processes is that of one process with the rows of each group alone."""
    x = torch.randn(3 * world, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save(x, tmp_path / "x.pt")
    together(world, "koleo_in_groups", str(tmp_path), group)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    whole = x.clone().requires_grad_()
    loss = torch.stack([koleo(rows) for rows in whole.split(group)]).mean()
    loss.backward()
    torch.testing.assert_close(torch.stack([part["loss"] for part in parts]).mean(), loss.detach())
    torch.testing.assert_close(torch.cat([part["grad"] for part in parts]) / world, whole.grad)
    assert abs(koleo(x) - loss) > 1e-3  # among all rows it would be another number
    with pytest.raises(ValueError, match=r"losses\.koleo\.group=2 must be a multiple of the 3 images"):
        koleo(x[:3], distributed=True, group=2)


def test_a_step_draws_one_size_for_all_images(v3, photos):
    mixed = "crops.mixed=[[0.5, 32, 16, 0], [0.25, 48, 16, 0], [0.25, 48, 24, 0]]"
    recipe = v3("x", mixed)
    source = registry.build("data.sources", recipe.data)
    data = TrainDataset(source, recipe.crops, BlockMasks(recipe.masks, (4, 4)), 0, 4)
    drawn = [data.variant(step) for step in range(2000)]
    shares = [drawn.count(i) / len(drawn) for i in range(3)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    for step in [drawn.index(i) for i in range(3)]:
        batch = collate([data[step, place] for place in range(4)])
        _, large, small, _ = recipe.crops.mixed[drawn[step]]
        assert batch.global_crops.shape[-2:] == (large, large)
        assert batch.local_crops.shape[-2:] == (small, small)
        assert batch.masks.shape == (8, (large // 8) ** 2)
    train(v3("mixed", mixed))
    with pytest.raises(ValueError, match=r"crops\.mixed\[0\]: 36=36 is no multiple of .* 8 pixels"):
        StudentTeacher(v3("x", "crops.mixed=[[1, 36, 16, 0]]"))
    with pytest.raises(ValueError, match=r"0 where crops\.gram_size is"):
        v3("x", "crops.mixed=[[1, 32, 16, 64]]")


def test_a_constant_rate_is_a_line_and_then_its_peak(v3):
    optim = Optim(steps=100, batch=4096, lr=2e-4, lr_batch=1024, warmup=10, schedule="constant")
    recipe = v3("x")
    recipe.optim = optim
    schedules = Schedules(recipe)
    assert [schedules.lr(i) for i in (0, 5, 9)] == pytest.approx([0, 2e-4, 3.6e-4])
    assert {schedules.lr(i) for i in (10, 11, 50, 99, 10_000)} == {4e-4}
    recipe.optim = replace(optim, head_warmup=10, warmup=0)
    assert [Schedules(recipe).lr(i) for i in (0, 9, 10, 99)] == [0, 0, 4e-4, 4e-4]
    recipe.losses["gram"] = {"weight": 2.0, "ramp": 4, "phase": (0.5, 1.0)}
    schedules = Schedules(recipe)
    got = [schedules.loss_weight("gram", i) for i in (50, 51, 52, 53, 54, 99)]
    assert got == pytest.approx([0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2, 2])
    assert schedules.loss_weight("koleo", 0) == 0.1


def test_the_weight_of_local_crops():
    student, teacher = torch.randn(4, 3, 5), torch.randn(2, 3, 5).softmax(-1)
    local = dino(student, teacher, 0.1) - dino(student, teacher, 0.1, local_weight=0.0)
    half = dino(student, teacher, 0.1, local_weight=0.5)
    torch.testing.assert_close(half, dino(student, teacher, 0.1) - local / 2)
    alone = dino(student[:2], teacher, 0.1) * 2 / 6  # 2 of 6 pairs are of global crops alone
    torch.testing.assert_close(dino(student, teacher, 0.1, local_weight=0.0), alone)


@pytest.mark.parametrize(
    "key", ["backbone.weights", "teacher.gram.weights", "teacher.frozen", "teacher.start"]
)
def test_what_is_trained_from_licensed_weights_stands_under_their_licence(key, v3, tmp_path):
    source = tmp_path / "released.pth"
    plain = v3("plain", "optim.steps=2", "optim.warmup=1")
    torch.save(build_backbone(plain).state_dict(), source)
    assert load_backbone(train(plain)).licence == ""
    if key == "teacher.start":
        source = train(v3("first", "optim.steps=2", "optim.warmup=1", f"backbone.weights={source}"))
    more = {"teacher.gram.weights": ["losses.gram.weight=1"], "teacher.frozen": ["masks=null"]}.get(key, [])
    recipe = v3("x", f"{key}={source}", *more, "optim.steps=4", "optim.warmup=1", "run.checkpoint_every=2")
    out = train(recipe)
    assert load_backbone(out).licence == "DINOv3 License"
    (out / "teacher.safetensors").unlink()
    shutil.rmtree(out / "checkpoints/step_0000004")
    train(recipe)  # goes on from step 2, with nothing but its checkpoint
    assert load_backbone(out).licence == "DINOv3 License"
