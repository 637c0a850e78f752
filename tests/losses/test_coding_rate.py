"""coding_rate() against NumPy's eigenvalues and finite differences, and at its two ends."""

import math

import numpy as np
import pytest
import torch

from dinokit.losses import Views
from dinokit.losses.coding_rate import Config, build, coding_rate
from dinokit.models.head import LazyLogits

NONE = LazyLogits(torch.empty(0, 1), torch.empty(0, 1))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rate(x: np.ndarray, eps: float) -> float:
    """Half the sum of the logarithms of the eigenvalues, those of the D x D matrix whatever B is."""
    z = x / np.sqrt((x**2).sum(axis=1, keepdims=True))
    count, width = z.shape
    return float(np.log(np.linalg.eigvalsh(np.eye(width) + width / (count * eps) * z.T @ z)).sum() / 2)


@pytest.mark.parametrize(("shape", "eps"), [((9, 4), 0.5), ((4, 9), 0.05), ((6, 6), 0.05), ((1, 3), 0.5)])
def test_equals_the_eigenvalues_of_numpy(shape, eps):
    x = normal(*shape)
    assert coding_rate(x, eps).item() == pytest.approx(rate(x.numpy(), eps), rel=1e-12)
    assert coding_rate(x.float(), eps).item() == pytest.approx(rate(x.numpy(), eps), rel=1e-5)
    assert coding_rate(3 * x, eps).item() == pytest.approx(rate(x.numpy(), eps), rel=1e-12)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_the_gradient_is_that_of_finite_differences(shape):
    x = normal(*shape).requires_grad_()
    coding_rate(x, 0.05).backward()
    step, want = 1e-6, torch.zeros(shape, dtype=torch.float64)
    for place in np.ndindex(shape):
        up, down = x.detach().numpy().copy(), x.detach().numpy().copy()
        up[place] += step
        down[place] -= step
        want[place] = (rate(up, 0.05) - rate(down, 0.05)) / (2 * step)
    torch.testing.assert_close(x.grad, want, rtol=1e-6, atol=1e-8)


def test_equal_rows_have_the_smallest_rate_and_rows_of_all_directions_the_largest():
    equal = normal(1, 8).expand(24, 8)
    even = torch.linalg.qr(normal(8, 8)).Q.repeat(3, 1)  # Z'Z = 3 I
    assert coding_rate(equal, 0.05).item() == pytest.approx(math.log(1 + 8 / 0.05) / 2, rel=1e-10)
    assert coding_rate(even, 0.05).item() == pytest.approx(8 * math.log(1 + 1 / 0.05) / 2, rel=1e-10)
    assert coding_rate(equal, 0.05) < coding_rate(normal(24, 8), 0.05) < coding_rate(even, 0.05)


def test_the_loss_is_scaled_by_both_sizes_and_a_step_downhill_spreads_the_rows():
    views = Views(NONE, NONE, normal(2, 5, 3).float(), NONE, NONE, torch.empty(0), 0.04)
    want = -(3 + 5) / (3 * 5) * sum(rate(x.double().numpy(), 0.5) for x in views.student_feature) / 2
    loss = build(Config(eps=0.5))
    assert loss(views).item() == pytest.approx(want, rel=1e-5)
    near = (normal(1, 1, 3) + 0.1 * normal(1, 5, 3, seed=1)).float().requires_grad_()
    views.student_feature = near
    loss(views).backward()
    rows = torch.stack([near.detach()[0], near.detach()[0] - 0.01 * near.grad[0]])
    cosines = [x @ x.T for x in torch.nn.functional.normalize(rows, dim=-1)]
    assert cosines[1].mean() < cosines[0].mean()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"losses.coding_rate.eps=0 must be above 0"):
        Config(eps=0)
