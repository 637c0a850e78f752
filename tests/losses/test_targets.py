"""Sinkhorn-Knopp against the iteration as published, and its promises."""

import math

import pytest
import torch

from dinokit.losses._targets import Centering, sinkhorn_knopp


def by_hand(logits: list, temp: float, iterations: int = 3) -> list:
    """SwAV's algorithm over Python floats: samples are rows here."""
    q = [[math.exp(x / temp) for x in row] for row in logits]
    for _ in range(iterations):
        mass = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[x / m for x, m in zip(row, mass, strict=True)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return q


@pytest.mark.parametrize(("rows", "prototypes"), [(1, 3), (6, 4), (10, 30)])
def test_equals_the_iteration_as_published(rows, prototypes, generator):
    logits = torch.randn(rows, prototypes, generator=generator)
    want = torch.tensor(by_hand(logits.tolist(), 0.07))
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.07), want, rtol=1e-4, atol=1e-7)


def test_rows_sum_to_one_and_prototypes_share_the_mass(generator):
    q = sinkhorn_knopp(torch.randn(64, 8, generator=generator), 0.1, iterations=50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 8.0), rtol=1e-2, atol=0)


def test_a_constant_added_to_all_logits_changes_nothing(generator):
    logits = torch.randn(9, 5, generator=generator)
    torch.testing.assert_close(
        sinkhorn_knopp(logits + 3, 0.05), sinkhorn_knopp(logits, 0.05), rtol=1e-4, atol=1e-6
    )


def test_equal_logits_give_equal_shares():
    torch.testing.assert_close(sinkhorn_knopp(torch.ones(7, 7), 0.04), torch.full((7, 7), 1 / 7))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_no_size_of_logits_overflows(scale, generator):
    q = sinkhorn_knopp(torch.randn(12, 6, generator=generator) * scale, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(12))


def test_no_rows_are_no_trouble():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.04).shape == (0, 5)


def test_the_centre_is_a_moving_average_of_steps_before(generator):
    first, second = torch.randn(2, 4, 3, generator=generator)
    centering = Centering(momentum=0.9)
    got = centering(first, 0.05, new_step=True)
    torch.testing.assert_close(got, (first / 0.05).softmax(dim=1))
    got = centering(second, 0.05, new_step=True)
    torch.testing.assert_close(got, ((second - 0.1 * first.mean(dim=0)) / 0.05).softmax(dim=1))


def test_a_step_without_rows_leaves_the_centre(generator):
    centering = Centering(momentum=0.9)
    centering(torch.randn(4, 3, generator=generator), 0.05, new_step=True)
    centering.fold()
    before = centering.center.clone()
    centering(torch.zeros(0, 3), 0.05, new_step=True)
    centering.fold()
    torch.testing.assert_close(centering.center, before, rtol=0, atol=0)
