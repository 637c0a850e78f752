"""Schedules against numpy's straight lines and the published cosine."""

import numpy as np
import pytest

from dinokit.config.load import Optim, Recipe, Teacher
from dinokit.train.schedule import Schedules, cosine


def recipe(**optim) -> Recipe:
    return Recipe(
        name="x",
        optim=Optim(**{"steps": 100, "batch": 512, "lr": 4e-3, "warmup": 10, "head_frozen": 5, **optim}),
        teacher=Teacher(momentum=(0.992, 1.0), temp=(0.04, 0.07), temp_warmup=30),
    )


def array_as_published(base: float, final: float, total: int, warmup: int) -> np.ndarray:
    i = np.arange(total - warmup)
    tail = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(0, base, warmup), tail])


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_the_learning_rate_is_the_published_array(warmup):
    s = Schedules(recipe(warmup=warmup))
    want = array_as_published(4e-3 * 0.5**0.5, 1e-6, 100, warmup)
    np.testing.assert_allclose([s.lr(i) for i in range(100)], want, rtol=1e-9)
    assert s.lr(100) == s.lr(1000) == 1e-6


def test_the_prototypes_stand_still_at_first():
    s = Schedules(recipe())
    assert [s.prototypes_lr(i) for i in range(5)] == [0.0] * 5
    assert s.prototypes_lr(5) == s.lr(5) > 0
    s = Schedules(recipe(head_freeze="gradient"))
    assert s.prototypes_lr(3) == s.lr(3) > 0


def test_heads_learn_alone_and_then_the_backbone_begins_as_if_the_run_began_there():
    s = Schedules(recipe(head_warmup=20))
    assert [s.lr(i) for i in range(20)] == [0.0] * 20
    want = array_as_published(4e-3 * 0.5**0.5, 1e-6, 80, 10)
    np.testing.assert_allclose([s.lr(i) for i in range(20, 100)], want, rtol=1e-9)
    peak = 4e-3 * 0.5**0.5
    np.testing.assert_allclose([s.head_lr(i) for i in range(20)], np.linspace(0, peak, 20), rtol=1e-9)
    assert [s.head_lr(i) for i in range(20, 30)] == [peak] * 10
    assert [s.head_lr(i) for i in range(30, 100)] == [s.lr(i) for i in range(30, 100)]


def test_the_teacher_temperature_is_a_line_with_both_ends():
    s = Schedules(recipe())
    np.testing.assert_allclose([s.teacher_temp(i) for i in range(30)], np.linspace(0.04, 0.07, 30))
    assert s.teacher_temp(30) == s.teacher_temp(99) == 0.07


def test_dino_changes_the_temperature_once_an_epoch():
    r = recipe()
    r.teacher.temp_every = 10
    got = [Schedules(r).teacher_temp(i) for i in range(40)]
    np.testing.assert_allclose(got, np.repeat([0.04, 0.055, 0.07, 0.07], 10))


def test_a_cosine_ends_where_it_should():
    assert cosine(0.04, 0.4, 0, 10) == pytest.approx(0.04)
    assert cosine(0.04, 0.4, 5, 10) == pytest.approx(0.22)
    assert cosine(0.04, 0.4, 10, 10) == 0.4


@pytest.mark.parametrize(
    ("rule", "batch", "reference", "lr", "peak"),
    [
        ("sqrt", 2048, 1024, 4e-3, 5.657e-3),
        ("sqrt", 3072, 1024, 2e-4, 3.464e-4),
        ("linear", 512, 256, 5e-4, 1e-3),
        ("none", 64, 1024, 1e-3, 1e-3),
    ],
)
def test_the_rate_grows_with_the_batch_by_the_rule(rule, batch, reference, lr, peak):
    optim = Optim(steps=1, batch=batch, lr=lr, lr_batch=reference, lr_rule=rule)
    assert optim.peak_lr == pytest.approx(peak, rel=1e-3)
