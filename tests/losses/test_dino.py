"""dino() against its definition written as loops over Python floats."""

import math

import pytest
import torch

from dinokit.losses.dino import dino


def by_hand(student: list, teacher: list, temp: float) -> float:
    """Mean over every (student crop, other teacher crop, image) of minus sum t log softmax(s / temp)."""
    terms = []
    for s, crop in enumerate(student):
        for t, target in enumerate(teacher):
            if s == t:
                continue
            for logits, probabilities in zip(crop, target, strict=True):
                total = sum(math.exp(x / temp) for x in logits)
                terms.append(
                    -sum(
                        p * math.log(math.exp(x / temp) / total)
                        for x, p in zip(logits, probabilities, strict=True)
                    )
                )
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("globals_", "locals_", "images"), [(2, 0, 1), (2, 3, 4), (3, 2, 2), (1, 2, 3)])
def test_equals_the_definition(globals_, locals_, images, generator):
    student = torch.rand(globals_ + locals_, images, 6, generator=generator)
    teacher = torch.rand(globals_, images, 6, generator=generator).softmax(dim=-1)
    want = by_hand(student.tolist(), teacher.tolist(), 0.1)
    assert dino(student, teacher, 0.1).item() == pytest.approx(want, rel=1e-5)


def test_equal_logits_of_the_student_cost_the_logarithm_of_the_number_of_prototypes(generator):
    teacher = torch.rand(2, 3, 50, generator=generator).softmax(dim=-1)
    assert dino(torch.zeros(6, 3, 50), teacher, 0.1).item() == pytest.approx(math.log(50), rel=1e-6)


def test_a_crop_is_never_compared_with_itself(generator):
    student, teacher = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)
    teacher[0, 0, 1] = teacher[1, 0, 2] = 1
    student.requires_grad_()
    dino(student, teacher, 0.1).backward()
    assert student.grad[0, 0].argmin() == 2  # downhill is towards the other crop's target
    assert student.grad[1, 0].argmin() == 1
