"""ibot() against its definition, and what its normalisation promises."""

import math

import pytest
import torch

from dinokit.config.load import load_recipe
from dinokit.data.batch import Batch
from dinokit.losses.ibot import ibot
from dinokit.train.student_teacher import StudentTeacher


def test_equals_the_definition(generator):
    counts, crops = [3, 0, 2], 3
    student = torch.randn(5, 4, generator=generator)
    teacher = torch.randn(5, 4, generator=generator).softmax(dim=-1)
    rows, total = iter(zip(student.tolist(), teacher.tolist(), strict=True)), 0.0
    for count in counts:
        for _ in range(count):
            s, t = next(rows)
            norm = math.log(sum(math.exp(x / 0.1) for x in s))
            total -= sum(p * (x / 0.1 - norm) for x, p in zip(s, t, strict=True)) / count
    weight = torch.tensor([1 / 3] * 3 + [1 / 2] * 2)
    assert ibot(student, teacher, weight, crops, 0.1).item() == pytest.approx(total / crops, rel=1e-5)


def test_twice_as_many_crops_without_a_mask_halve_it(generator):
    student, teacher = torch.randn(6, 4, generator=generator), torch.full((6, 4), 0.25)
    weight = torch.full((6,), 1 / 6)
    one, two = (ibot(student, teacher, weight, crops, 0.1) for crops in (1, 2))
    torch.testing.assert_close(one, 2 * two)


def test_no_mask_is_no_loss_but_still_has_a_gradient():
    student = torch.zeros(0, 4, requires_grad=True)
    value = ibot(student, torch.zeros(0, 4), torch.zeros(0), 8, 0.1)
    value.backward()
    assert value.item() == 0


def test_the_gradient_of_a_patch_is_its_weight_times_what_the_student_has_too_much(generator):
    student = torch.randn(5, 4, generator=generator).requires_grad_()
    teacher = torch.randn(5, 4, generator=generator).softmax(dim=-1)
    weight = torch.tensor([0.5, 0.5, 0.25, 0.0, 0.25])
    ibot(student, teacher, weight, 2, 0.1).backward()
    want = ((student.detach() / 0.1).softmax(dim=-1) - teacher) * weight[:, None] / (2 * 0.1)
    torch.testing.assert_close(student.grad, want)


@pytest.mark.parametrize(("masked", "logits"), [((), "chunks"), ((0, 3, 17), "chunks"), ((5,), "whole")])
def test_all_patches_count_alike_and_the_student_sees_the_mask(masked, logits):
    settings = "patches=all", "targets=centering", "student_temp=0.2"
    words = [f"losses.ibot.{word}" for word in settings] + [
        "crops.globals.size=32", "crops.locals.size=16", "backbone.size=32", f"run.logits={logits}",
    ]  # fmt: skip
    torch.manual_seed(0)
    model = StudentTeacher(load_recipe("scenes_cpu", words))
    torch.nn.init.normal_(model.student.backbone.mask_token)
    masks = torch.zeros(2, 16, dtype=torch.bool)  # of the two global crops of one image
    masks.view(-1)[list(masked)] = True
    crops, none = torch.randn(2, 3, 32, 32), torch.zeros(0, dtype=torch.int64)
    batch = Batch(0, 1, crops, torch.zeros(0, 3, 16, 16), none, none, masks, none, torch.zeros(0))
    value = model(batch, 0.05, ["ibot"])["ibot"].item()
    with torch.no_grad():
        student, teacher = (
            network.logits(torch.empty(0, network.backbone.width), tokens.patches.flatten(0, 1))[1].logits()
            for network, seen in ((model.student, masks), (model.teacher, None))
            for tokens in network.backbone([crops], [seen])
        )
    entropies = [
        -sum(p * math.log(q) for p, q in zip(t, s, strict=True))
        for t, s in zip(
            (teacher / 0.05).softmax(-1).tolist(), (student / 0.2).softmax(-1).tolist(), strict=True
        )
    ]
    assert len(entropies) == 32
    assert value == pytest.approx(sum(entropies) / 32, rel=1e-4)
