"""Losses and targets against numbers recorded from the reference implementations."""

import pytest
import torch

from dinokit.losses import Views, chunked
from dinokit.losses.centering import Centering
from dinokit.losses.dino import dino
from dinokit.losses.ibot import ibot
from dinokit.losses.koleo import koleo
from dinokit.losses.sinkhorn import sinkhorn_knopp
from dinokit.models.head import LazyLogits

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def in_slices(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    lazy = LazyLogits(logits, torch.eye(logits.shape[1]))
    return chunked.sinkhorn_knopp([lazy], temperature)[0].probabilities()


def centered_in_slices(centering: Centering, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    none, lazy = torch.zeros(0, 1), LazyLogits(logits, torch.eye(logits.shape[1]))
    return centering.in_slices(
        Views(lazy, lazy, none, lazy, lazy, none, temperature), "patch"
    ).probabilities()


@pytest.fixture
def losses(golden):
    return golden("losses")


@pytest.mark.parametrize("balanced", [sinkhorn_knopp, in_slices])
def test_sinkhorn_is_the_recorded_one(losses, balanced):
    got = balanced(losses["teacher_logits"], losses["teacher_temp"].item())
    torch.testing.assert_close(got, losses["sinkhorn"], **CLOSE)
    got = balanced(losses["patch_teacher_logits"], losses["patch_teacher_temp"].item())
    torch.testing.assert_close(got, losses["patch_sinkhorn"], **CLOSE)


def test_dino_and_its_gradient_are_the_recorded_ones(losses):
    teacher = losses["sinkhorn"].unflatten(0, (2, -1))
    images = teacher.shape[1]
    groups = [losses["student_global"].requires_grad_(), losses["student_local"].requires_grad_()]
    value = dino(torch.cat(groups).unflatten(0, (-1, images)), teacher, losses["student_temp"].item())
    locals_ = len(groups[1]) // images
    pairs = 2 + 2 * locals_
    # The recording holds the sum over local pairs, and the mean of the two pairs of global crops.
    want = losses["local_sum_over_pairs"] + 2 * losses["global_cross_sum"]
    torch.testing.assert_close(value * pairs, want, **CLOSE)
    (value * pairs).backward()
    torch.testing.assert_close(groups[1].grad, losses["grad_local"], **CLOSE)
    torch.testing.assert_close(groups[0].grad / 2, losses["grad_global"], **CLOSE)


@pytest.mark.parametrize("centered", [Centering.__call__, centered_in_slices])
def test_centering_is_the_recorded_one_over_two_steps(losses, centered):
    centering, temp = (
        Centering(losses["teacher_logits"].shape[1], momentum=0.9),
        losses["teacher_temp"].item(),
    )
    for step in (1, 2):
        logits = losses["teacher_logits" if step == 1 else "teacher_logits_2"]
        got = centered(centering, logits, temp)
        torch.testing.assert_close(got, losses[f"centering_step{step}"].reshape(got.shape), **CLOSE)
        centering.end_of_step()
    torch.testing.assert_close(centering.center, losses["center_after_2"].flatten(), **CLOSE)


@pytest.mark.parametrize("centered", [Centering.__call__, centered_in_slices])
def test_centering_of_patches_is_the_recorded_one(losses, centered):
    centering = Centering(losses["patch_teacher_logits"].shape[1], momentum=0.9)
    got = centered(centering, losses["patch_teacher_logits"], losses["patch_teacher_temp"].item())
    torch.testing.assert_close(got, losses["patch_centering_step1"].reshape(got.shape), **CLOSE)
    centering.end_of_step()
    torch.testing.assert_close(centering.center, losses["patch_center_after_1"].flatten(), **CLOSE)


def test_ibot_and_its_gradient_are_the_recorded_ones(losses):
    masks = losses["masks"]
    weight = (1 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
    student = losses["patch_student"].requires_grad_()
    value = ibot(student, losses["patch_sinkhorn"], weight, len(masks), losses["student_temp"].item())
    torch.testing.assert_close(value, losses["ibot"], **CLOSE)
    value.backward()
    torch.testing.assert_close(student.grad, losses["grad_patch_student"], **CLOSE)


def test_koleo_and_its_gradient_are_the_recorded_ones(losses):
    x = losses["koleo_x"].requires_grad_()
    value = koleo(x)
    torch.testing.assert_close(value, losses["koleo"], **CLOSE)
    value.backward()
    torch.testing.assert_close(x.grad, losses["grad_koleo"], **CLOSE)
