"""ibot() against its definition, and what its normalisation promises."""

import math

import pytest
import torch

from dinokit.losses.ibot import ibot


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
