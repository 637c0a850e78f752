"""A student under a frozen teacher: the losses by hand, what moves and what does not, and whole runs."""

import math
from pathlib import Path

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.data.batch import Batch
from dinokit.features import fingerprint
from dinokit.losses import Views
from dinokit.losses.chunked import sinkhorn_knopp
from dinokit.models.head import LazyLogits
from dinokit.train import trainer
from dinokit.train.networks import read_frozen_teacher
from dinokit.train.plan import plan
from dinokit.train.step import Step
from dinokit.train.student_teacher import StudentTeacher
from dinokit.weights import load_backbone, save_backbone

DISTIL = ("masks=null", "backbone.drop_path=0")


def train(recipe):
    return trainer.train(recipe, registry.build("data.sources", recipe.data))


@pytest.fixture
def teacher(tiny, tmp_path):
    """The file of a backbone wider than the student."""
    recipe = tiny("x")
    section = {**recipe.backbone, "width": 36, "depth": 3, "heads": 3}
    torch.manual_seed(5)
    backbone = registry.build("models", section)
    backbone.input = type(backbone.input)(32, tuple(recipe.crops.mean), tuple(recipe.crops.std))
    path = tmp_path / "teacher.safetensors"
    save_backbone(path, backbone, section)
    return path


@pytest.fixture
def run(tiny):
    """A run that trained a wider backbone with its heads, and left a checkpoint."""
    return train(tiny("run", "backbone.width=36", "backbone.heads=3"))


def batch(images: int = 3) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        step=0, images=images, global_crops=torch.randn(2 * images, 3, 32, 32),
        local_crops=torch.randn(2 * images, 3, 16, 16), global_colour=none, local_colour=none,
        masks=None, masked=none, mask_weight=torch.zeros(0),
    )  # fmt: skip


def cross_entropy(student, target) -> float:
    z = [x / 0.1 for x in student]
    top = max(z)
    log_sum = top + math.log(sum(math.exp(x - top) for x in z))
    return sum(t * (log_sum - x) for t, x in zip(target, z, strict=True))


@pytest.mark.parametrize("tokens", ["read", "all"])
def test_ibot_is_the_mean_over_all_patches_of_both_global_crops(tiny, run, tokens):
    words = [f"run.tokens={tokens}", "losses.ibot.targets=centering", "losses.dino.targets=centering"]
    model = StudentTeacher(tiny("a", f"teacher.frozen={run}", *DISTIL, *words))
    seen = batch()
    torch.nn.init.normal_(model.student.dino_head.last_layer.weight_g)
    value = model(seen, teacher_temp=0.05)["ibot"].item()
    own, heads = model.student, model.teacher.heads
    student = own.dino_head(own.backbone([seen.global_crops], [None])[0].patches).logits().double()
    target = heads.dino_head(heads.backbone([seen.global_crops], [None])[0].patches).logits().double()
    target = (target / 0.05).softmax(dim=-1)
    pairs = zip(student.flatten(0, 1).tolist(), target.flatten(0, 1).tolist(), strict=True)
    entropies = [cross_entropy(s, t) for s, t in pairs]
    assert len(entropies) == 6 * 16
    assert value == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_a_run_gives_its_heads_and_a_file_gets_fresh_ones_that_learn(tiny, run, teacher):
    own = StudentTeacher(tiny("a", f"teacher.frozen={run}", *DISTIL))
    assert set(own(batch(), 0.05)) == {"dino", "ibot", "koleo"}
    fresh = StudentTeacher(tiny("b", f"teacher.frozen={teacher}", *DISTIL))
    values = fresh(batch(), 0.05)
    assert set(values) == {"dino", "ibot", "koleo", "guide_dino", "guide_ibot"}
    values["dino"].backward()
    assert all(p.grad is None for p in fresh.student.guide.parameters())
    fresh.zero_grad()
    (values["guide_dino"] + values["guide_ibot"]).backward()
    assert all(p.grad.abs().sum() > 0 for p in fresh.student.guide.parameters())
    assert all(p.grad is None for p in fresh.student.backbone.parameters())


def test_a_step_moves_student_average_and_fresh_heads_but_not_the_teacher(tiny, teacher, saved):
    recipe = tiny("a", f"teacher.frozen={teacher}", *DISTIL, "run.checkpoint_every=1", "run.keep=6")
    out = train(recipe)
    states = [saved(path) for path in sorted((out / "checkpoints").iterdir())]
    moved = {name for name in states[0] if not torch.equal(states[1][name], states[4][name])}
    for part in ("student.backbone.", "student.dino_head.", "student.guide.dino_head.", "average.backbone."):
        assert any(name.startswith(part) for name in moved), part
    assert not any("teacher" in name for name in states[0])
    exported = load_backbone(out).state_dict()
    assert all(torch.equal(states[5][f"average.backbone.{name}"], value) for name, value in exported.items())
    assert any(not torch.equal(states[5][f"student.backbone.{name}"], exported[name]) for name in exported)


def test_a_frozen_teacher_is_held_in_the_dtype_of_the_step_and_says_the_same(tiny, run):
    words = [f"teacher.frozen={run}", *DISTIL]
    crops = batch().global_crops
    float32, cast = (read_frozen_teacher(tiny("a", *words)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = float32.backbone([crops], [None])[0]
        seen = cast.read([crops], [None], torch.arange(6 * 16))
        scores = [
            float32.logits(want.cls, want.patches.flatten(0, 1)),
            cast.logits(seen.cls[0], seen.patches),
        ]
    assert torch.equal(seen.cls[0], want.cls)
    assert torch.equal(seen.patches, want.patches.flatten(0, 1))
    for one, two in zip(*scores, strict=True):
        assert torch.equal(one.logits(), two.logits())
    assert cast.backbone.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert cast.backbone.norm.weight.dtype == torch.float32


def test_the_average_is_the_average_of_the_student_alone(tiny, teacher):
    step = Step(tiny("a", f"teacher.frozen={teacher}", *DISTIL), torch.device("cpu"))
    before = {name: p.clone() for name, p in step.model.ema.named_parameters()}
    with torch.no_grad():
        for p in step.model.student.parameters():
            p.add_(torch.randn_like(p))
    step.model.update_teacher(0.75)
    student = dict(step.model.student.named_parameters())
    assert before.keys() == {name for name in student if not name.startswith("guide.")}
    for name, p in step.model.ema.named_parameters():
        torch.testing.assert_close(p, 0.75 * before[name] + 0.25 * student[name])


@pytest.mark.parametrize("kind", ["run", "teacher"])
def test_a_distillation_goes_on_bit_for_bit(tiny, kind, request, cut_short, same_run):
    words = [f"teacher.frozen={request.getfixturevalue(kind)}", *DISTIL]
    whole = train(tiny("whole", *words))
    cut_short(tiny("broken", *words))
    same_run(whole, train(tiny("broken", *words)))


def test_a_run_does_not_go_on_under_another_teacher(tiny, teacher):
    recipe = tiny("a", f"teacher.frozen={teacher}", *DISTIL)
    train(recipe)
    backbone = load_backbone(teacher)
    torch.nn.init.normal_(backbone.norm.weight)
    save_backbone(teacher, backbone, {**recipe.architecture, "width": 36, "depth": 3, "heads": 3})
    with pytest.raises(ValueError, match="not the teacher that this run began with"):
        train(recipe)


def test_a_distilled_run_can_teach_in_turn(tiny, teacher):
    out = train(tiny("a", f"teacher.frozen={teacher}", *DISTIL))
    chained = read_frozen_teacher(tiny("b", f"teacher.frozen={out}", *DISTIL))
    assert fingerprint(chained.backbone) == fingerprint(load_backbone(out))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["heads.cls.prototypes=16"], r"32 prototypes, and heads\.cls\.prototypes=16"),
        (["heads.patch.prototypes=32"], "has heads for cls, this recipe for cls and patch"),
        (["crops.mean=[0.5,0.5,0.5]"], r"set crops\.mean=\[0\.485,0\.456,0\.406\]"),
        (["backbone.patch=4"], r"Set backbone\.patch=8"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_words(tiny, run, words, answer):
    with pytest.raises(ValueError, match=answer):
        StudentTeacher(tiny("a", f"teacher.frozen={run}", *DISTIL, *words))


def test_masks_have_no_place_under_a_frozen_teacher(tiny):
    with pytest.raises(ValueError, match=r"nothing is masked.*masks=null"):
        tiny("a", "teacher.frozen=x")
    with pytest.raises(ValueError, match="no section `masks`"):
        tiny("a", "masks=null")


def test_a_plan_counts_every_patch_and_opens_no_teacher(tiny):
    recipe = tiny("a", "teacher.frozen=/nowhere/at/all", *DISTIL)
    assert plan(recipe)["teacher"].startswith("/nowhere/at/all, frozen")


def nats_told(heads, patches: torch.Tensor, kinds: torch.Tensor) -> float:
    """Mutual information between the target's prototype of a patch and its kind; ln 10 is all there is."""
    with torch.no_grad():
        targets = sinkhorn_knopp([heads.logits(patches[:0], patches)[1]], 0.05)[0]
        chosen = targets.probabilities().argmax(dim=1)
    joint = torch.zeros(32, 10).index_put_((chosen, kinds), torch.ones(len(kinds)), accumulate=True)
    joint /= joint.sum()
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return (joint * (joint / apart).clamp(min=1e-12).log()).sum().item()


def test_fresh_heads_come_to_tell_apart_what_the_teacher_does(tiny, teacher):
    """Tokens around ten centres, new ones every step: drawn heads hash them, heads that learn sort them."""
    torch.manual_seed(0)
    model = StudentTeacher(tiny("a", f"teacher.frozen={teacher}", *DISTIL))
    guide, loss = model.student.guide, model.guide_losses[model.loss_names.index("ibot")]
    centres = 0.6 * torch.randn(10, 36)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = torch.randint(10, (count,))
        return centres[kinds] + 0.6 * torch.randn(count, 36), kinds

    before = nats_told(guide, *draw(2000))
    optimizer = torch.optim.AdamW(guide.parameters(), lr=2e-3)
    none, weight = LazyLogits(torch.zeros(1, 1, 32), torch.eye(32)), torch.full((256,), 1 / 256)
    for _ in range(120):
        tokens = draw(256)[0]
        logits = guide.logits(tokens[:0], tokens)[1]
        optimizer.zero_grad()
        loss(Views(none, none, none.rows, logits, logits.detach(), weight, 0.05)).backward()
        optimizer.step()
    after = nats_told(guide, *draw(2000))
    assert before < 1.4
    assert after > max(1.9, before + 0.5), (before, after)


def test_the_run_of_a_teacher_is_read_with_its_own_recipe(tiny, run):
    network = read_frozen_teacher(tiny("a", f"teacher.frozen={run}", *DISTIL)).heads
    assert network.backbone.width == load_recipe(Path(run) / "recipe.yaml").backbone["width"] == 36
    assert fingerprint(network.backbone) == fingerprint(load_backbone(run))
