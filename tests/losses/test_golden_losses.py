"""Losses and targets against numbers recorded from the reference implementations."""

import pytest
import torch

from dinokit.losses import Views
from dinokit.losses._targets import Centering, sinkhorn_knopp
from dinokit.losses.dino import dino
from dinokit.losses.ibot import ibot
from dinokit.losses.koleo import koleo
from dinokit.models.head import LazyLogits

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def scores_of(logits: torch.Tensor) -> LazyLogits:
    return LazyLogits(logits, torch.eye(logits.shape[1]))


def balanced(logits: torch.Tensor, temp: float) -> torch.Tensor:
    return sinkhorn_knopp([scores_of(logits)], temp)[0].probabilities()


def centred(centering: Centering, logits: torch.Tensor, temp: float) -> torch.Tensor:
    none, scores = torch.zeros(0, 1), scores_of(logits)
    views = Views(scores, scores, none, scores, scores, none, teacher_temp=temp, new_step=True)
    return centering(views, "cls").probabilities()


@pytest.fixture
def losses(golden):
    return golden("losses")


def test_sinkhorn_is_the_recorded_one(losses):
    got = balanced(losses["teacher_logits"], losses["teacher_temp"].item())
    torch.testing.assert_close(got, losses["sinkhorn"], **CLOSE)
    got = balanced(losses["patch_teacher_logits"], losses["patch_teacher_temp"].item())
    torch.testing.assert_close(got, losses["patch_sinkhorn"], **CLOSE)


def test_dino_and_its_gradient_are_the_recorded_ones(losses):
    teacher = losses["sinkhorn"].unflatten(0, (2, -1))
    images = teacher.shape[1]
    parts = [losses["student_global"].requires_grad_(), losses["student_local"].requires_grad_()]
    value = dino(torch.cat(parts).unflatten(0, (-1, images)), teacher, losses["student_temp"].item())
    locals_ = len(parts[1]) // images
    pairs = 2 + 2 * locals_
    # The recording holds the sum over local pairs, and the mean of the two pairs of global crops.
    want = losses["local_sum_over_pairs"] + 2 * losses["global_cross_sum"]
    torch.testing.assert_close(value * pairs, want, **CLOSE)
    (value * pairs).backward()
    torch.testing.assert_close(parts[1].grad, losses["grad_local"], **CLOSE)
    torch.testing.assert_close(parts[0].grad / 2, losses["grad_global"], **CLOSE)


def test_centering_is_the_recorded_one_over_two_steps(losses):
    centering, temp = Centering(momentum=0.9), losses["teacher_temp"].item()
    for step in (1, 2):
        logits = losses["teacher_logits" if step == 1 else "teacher_logits_2"]
        got = centred(centering, logits, temp)
        torch.testing.assert_close(got, losses[f"centering_step{step}"].reshape(got.shape), **CLOSE)
    centering.fold()
    torch.testing.assert_close(centering.center, losses["center_after_2"].flatten(), **CLOSE)


def test_centering_of_patches_is_the_recorded_one(losses):
    centering = Centering(momentum=0.9)
    got = centred(centering, losses["patch_teacher_logits"], losses["patch_teacher_temp"].item())
    torch.testing.assert_close(got, losses["patch_centering_step1"].reshape(got.shape), **CLOSE)
    centering.fold()
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
