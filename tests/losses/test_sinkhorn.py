"""Sinkhorn-Knopp, plain and sliced, against the iteration as published."""

import math

import pytest
import torch

from dinokit.losses import chunked
from dinokit.losses.sinkhorn import sinkhorn_knopp
from dinokit.models.head import LazyLogits


def lazy(logits: torch.Tensor) -> LazyLogits:
    return LazyLogits(logits, torch.eye(logits.shape[1]))


def in_slices(logits: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    return chunked.sinkhorn_knopp([lazy(logits)], temperature, iterations)[0].probabilities()


@pytest.fixture(params=[sinkhorn_knopp, in_slices], ids=["plain", "sliced"])
def balanced(request):
    """(logits (R, K), temperature, iterations=3) -> probabilities (R, K)."""
    return request.param


def by_hand(logits: list, temp: float, iterations: int = 3) -> list:
    """SwAV's algorithm over Python floats: samples are rows here."""
    q = [[math.exp(x / temp) for x in row] for row in logits]
    for _ in range(iterations):
        mass = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[x / m for x, m in zip(row, mass, strict=True)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return q


@pytest.mark.parametrize(("rows", "prototypes"), [(1, 3), (6, 4), (10, 30)])
def test_equals_the_iteration_as_published(balanced, rows, prototypes, generator):
    logits = torch.randn(rows, prototypes, generator=generator)
    want = torch.tensor(by_hand(logits.tolist(), 0.07))
    torch.testing.assert_close(balanced(logits, 0.07), want, rtol=1e-4, atol=1e-7)


def test_rows_sum_to_one_and_prototypes_share_the_mass(balanced, generator):
    q = balanced(torch.randn(64, 8, generator=generator), 0.1, iterations=50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 8.0), rtol=1e-2, atol=0)


def test_a_constant_added_to_all_logits_changes_nothing(balanced, generator):
    logits = torch.randn(9, 5, generator=generator)
    torch.testing.assert_close(balanced(logits + 3, 0.05), balanced(logits, 0.05), rtol=1e-4, atol=1e-6)


def test_equal_logits_give_equal_shares(balanced):
    torch.testing.assert_close(balanced(torch.ones(7, 7), 0.04), torch.full((7, 7), 1 / 7))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_no_size_of_logits_overflows(balanced, scale, generator):
    q = balanced(torch.randn(12, 6, generator=generator) * scale, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(12))


def test_no_rows_are_allowed(balanced):
    assert balanced(torch.zeros(0, 5), 0.04).shape == (0, 5)


def test_two_heads_together_are_each_alone(generator):
    one, two = torch.randn(6, 9, generator=generator), torch.randn(11, 5, generator=generator)
    together = chunked.sinkhorn_knopp([lazy(one), lazy(two)], 0.1)
    for targets, logits in zip(together, (one, two), strict=True):
        torch.testing.assert_close(targets.probabilities(), sinkhorn_knopp(logits, 0.1))


def test_an_iteration_needs_one_collective_for_both_heads(generator, monkeypatch):
    calls = []
    for name in ("all_reduce_sum", "all_reduce_max"):
        monkeypatch.setattr(chunked, name, lambda x, name=name: calls.append((name, len(x))) or x)
    chunked.sinkhorn_knopp([lazy(torch.randn(4, k, generator=generator)) for k in (3, 5)], 0.1)
    assert calls == [("all_reduce_max", 8)] + 3 * [("all_reduce_sum", 8)]
