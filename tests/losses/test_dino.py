"""dino() against its definition written as loops over Python floats."""

import math

import pytest
import torch

from dinokit.losses import Views
from dinokit.losses.dino import Config, DINOLoss, dino
from dinokit.models.head import LazyLogits


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


def test_a_student_that_knows_nothing_pays_the_logarithm_of_the_number_of_prototypes(generator):
    teacher = torch.rand(2, 3, 50, generator=generator).softmax(dim=-1)
    assert dino(torch.zeros(6, 3, 50), teacher, 0.1).item() == pytest.approx(math.log(50), rel=1e-6)


def test_a_crop_is_never_asked_to_predict_itself(generator):
    student, teacher = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)
    teacher[0, 0, 1] = teacher[1, 0, 2] = 1
    student.requires_grad_()
    dino(student, teacher, 0.1).backward()
    assert student.grad[0, 0].argmin() == 2  # downhill is towards the other crop's target
    assert student.grad[1, 0].argmin() == 1


def views(student: torch.Tensor, teacher: torch.Tensor, new_step: bool = True) -> Views:
    none, eye = torch.zeros(0, 1), torch.eye(student.shape[-1])
    one, two, no_patch = (LazyLogits(x, eye) for x in (student, teacher, teacher[0, :0]))
    return Views(one, two, none, no_patch, no_patch, none, teacher_temp=0.05, new_step=new_step)


def test_parts_of_a_step_move_the_centre_as_the_whole_does(generator):
    teacher = torch.randn(3, 2, 8, 6, generator=generator)  # (steps, G, B, K)
    whole, parts = (DINOLoss(Config(targets="centering")) for _ in range(2))
    for step in teacher:
        whole(views(step, step))
        values = [parts(views(part, part, new_step=i == 0)) for i, part in enumerate(step.split(4, dim=1))]
        assert len(values) == 2
    whole.targets.fold()
    parts.targets.fold()
    torch.testing.assert_close(whole.targets.center, parts.targets.center)
    assert whole.targets.center.abs().max() > 0


def test_a_centre_survives_saving(generator):
    teacher = torch.randn(2, 3, 6, generator=generator)
    loss = DINOLoss(Config(targets="centering"))
    loss(views(teacher, teacher))
    again = DINOLoss(Config(targets="centering"))
    again.load_state_dict(loss.state_dict())
    for module in (loss, again):
        module.targets.fold()
    torch.testing.assert_close(again.targets.center, loss.targets.center, rtol=0, atol=0)
