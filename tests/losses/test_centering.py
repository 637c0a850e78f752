"""Centering: the softmax, and the moving average over steps, micro-batches and saving."""

import pytest
import torch

from dinokit.losses import Views, end_of_step
from dinokit.losses.centering import Centering
from dinokit.losses.dino import Config, DINOLoss
from dinokit.models.head import LazyLogits


def views_of(student: torch.Tensor, teacher: torch.Tensor, whole_logits: bool) -> Views:
    """Views of the class token's logits (G, B, K)."""
    none, eye = torch.zeros(0, 1), torch.eye(student.shape[-1])
    one, two, no_patch = (LazyLogits(x, eye) for x in (student, teacher, teacher[0, :0]))
    return Views(one, two, none, no_patch, no_patch, none, 0.05, whole_logits)


@pytest.fixture(params=["plain", "sliced"])
def centered(request):
    """(centering, logits (R, K), temperature) -> probabilities (R, K)."""

    def sliced(centering: Centering, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        views = views_of(logits[None], logits[None], whole_logits=False)
        views.teacher_temp = temperature
        return centering.in_slices(views, "cls").probabilities()

    return sliced if request.param == "sliced" else Centering.__call__


def test_the_centre_is_a_moving_average_of_the_steps_before(centered, generator):
    first, second = torch.randn(2, 4, 3, generator=generator)
    centering = Centering(3, momentum=0.9)
    got = centered(centering, first, 0.05)
    torch.testing.assert_close(got, (first / 0.05).softmax(dim=1))
    centering.end_of_step()
    got = centered(centering, second, 0.05)
    torch.testing.assert_close(got, ((second - 0.1 * first.mean(dim=0)) / 0.05).softmax(dim=1))


def test_a_step_without_rows_leaves_the_centre(centered, generator):
    centering = Centering(3, momentum=0.9)
    centered(centering, torch.randn(4, 3, generator=generator), 0.05)
    centering.end_of_step()
    before = centering.center.clone()
    centered(centering, torch.zeros(0, 3), 0.05)
    centering.end_of_step()
    torch.testing.assert_close(centering.center, before, rtol=0, atol=0)


@pytest.mark.parametrize("whole_logits", [True, False])
def test_micro_batches_move_the_centre_as_the_whole_batch_does(whole_logits, generator):
    teacher = torch.randn(3, 2, 8, 6, generator=generator)  # (steps, G, B, K)
    whole, cut = (DINOLoss(Config(targets="centering"), {"cls": 6}) for _ in range(2))
    for step in teacher:
        whole(views_of(step, step, whole_logits))
        for micro_batch in step.split(4, dim=1):
            cut(views_of(micro_batch, micro_batch, whole_logits))
        end_of_step(whole)
        end_of_step(cut)
    torch.testing.assert_close(whole.targets.center, cut.targets.center)
    assert whole.targets.center.abs().max() > 0


def test_a_centre_survives_saving_and_saving_changes_nothing(generator):
    teacher = torch.randn(2, 3, 6, generator=generator)
    loss, loaded = (DINOLoss(Config(targets="centering"), {"cls": 6}) for _ in range(2))
    loss(views_of(teacher, teacher, whole_logits=False))
    loaded.load_state_dict(loss.state_dict())
    for module in (loss, loaded):
        assert module.targets.rows == 6
        end_of_step(module)
    torch.testing.assert_close(loaded.targets.center, loss.targets.center, rtol=0, atol=0)
