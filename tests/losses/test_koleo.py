"""koleo() against its definition written as loops over Python floats: no torch in the oracle."""

import math

import pytest
import torch

from dinokit.losses.koleo import koleo


def koleo_by_hand(rows: list[list[float]], eps: float) -> float:
    """The definition in Sablayrolles et al. 2019, one pair of points at a time."""
    unit = [[a / math.hypot(*row) for a in row] for row in rows]
    nearest = [min(math.dist(u, w) for j, w in enumerate(unit) if j != i) for i, u in enumerate(unit)]
    return -sum(math.log(d + eps) for d in nearest) / len(nearest)


@pytest.mark.parametrize(("batch", "width"), [(2, 1), (2, 3), (17, 5), (64, 32)])
def test_equals_the_definition(batch, width):
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert koleo(x).item() == pytest.approx(koleo_by_hand(x.tolist(), 1e-8), rel=1e-9)


@pytest.mark.parametrize("points", [3, 8])
def test_points_spread_evenly_on_a_circle(points):
    angle = torch.arange(points) * 2 * math.pi / points
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert koleo(x).item() == pytest.approx(-math.log(2 * math.sin(math.pi / points)), rel=1e-5)


def test_a_step_downhill_moves_the_two_nearest_points_apart():
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]], requires_grad=True)
    koleo(x).backward()
    assert x.grad is not None
    assert koleo(x.detach() - 0.01 * x.grad) < koleo(x.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_copies_cost_much_but_not_infinitely_much(dtype):
    x = torch.ones(2, 4, dtype=dtype, requires_grad=True)
    value = koleo(x)
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-8), rel=1e-4)
    assert x.grad.isfinite().all()
