"""sigreg() against a loop over Python floats and against integrals by SciPy; lejepa.py by hand."""

import cmath
import math

import pytest
import torch
from scipy.integrate import quad

from dinokit.config.load import load_recipe
from dinokit.data.batch import Batch
from dinokit.losses import Views, lejepa, sigreg
from dinokit.losses.sigreg import random_directions
from dinokit.models.head import LazyLogits
from dinokit.train.student_teacher import StudentTeacher

NONE = LazyLogits(torch.empty(0, 1), torch.empty(0, 1))
CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(projections, t):
    """|phi(t) - g(t)|^2 g(t) of Python floats."""
    phi = sum(cmath.exp(1j * t * p) for p in projections) / len(projections)
    gaussian = math.exp(-t * t / 2)
    return abs(phi - gaussian) ** 2 * gaussian


def loop(x, directions):
    """The statistic of one set of rows, one direction and one knot at a time."""
    total, knots = 0.0, [3 * k / 16 for k in range(17)]
    for d in directions.T.tolist():
        projections = [sum(a * b for a, b in zip(row, d, strict=True)) for row in x.tolist()]
        values = [distance(projections, t) for t in knots]
        total += len(x) * 2 * 3 / 16 * (sum(values) - (values[0] + values[-1]) / 2)
    return total / directions.shape[1]


def test_equals_a_loop_over_floats():
    x, directions = normal(2, 5, 3), random_directions(3, 4, 1, CPU).double()
    want = (loop(x[0], directions) + loop(x[1], directions)) / 2
    assert sigreg.sigreg(x, directions).item() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("rows", [[0.0] * 8, [1.5, -1.5], [-0.3, 0.2, 4.0]])
def test_is_nearly_the_integral_over_the_whole_line(rows):
    """By SciPy's quadrature: the knots change little, and the part beyond 3 is less than 2 %."""
    got = sigreg.sigreg(torch.tensor(rows).double()[:, None], torch.ones(1, 1).double()).item()
    between, whole = (2 * len(rows) * quad(lambda t: distance(rows, t), 0, end)[0] for end in (3, math.inf))
    assert got == pytest.approx(between, rel=1e-3)
    assert got == pytest.approx(whole, rel=2e-2)


def test_gaussian_rows_have_their_expectation_and_collapsed_ones_grow_with_the_batch():
    directions = random_directions(16, 64, 0, CPU).double()
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))  # of any number of rows
    for count in (16, 64):
        gaussian = sigreg.sigreg(normal(200, count, 16), directions).item()
        assert gaussian == pytest.approx(expected, rel=0.03)
        collapsed = sigreg.sigreg(torch.zeros(count, 16), directions.float()).item()
        exact = count * math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
        assert collapsed == pytest.approx(exact, rel=2e-2)
        assert collapsed > 6 * gaussian


@pytest.mark.parametrize("change", [lambda x: 3 * x, lambda x: x / 3, lambda x: x + 1, lambda x: x[..., :1]])
def test_another_scale_another_mean_and_a_lower_rank_cost_more(change):
    directions, x = random_directions(16, 64, 0, CPU).double(), normal(20, 64, 16)
    changed = change(x).expand(x.shape)
    assert sigreg.sigreg(changed, directions) > 1.5 * sigreg.sigreg(x, directions)


def test_gradient_descent_turns_collapsed_rows_into_gaussian_ones():
    x = 0.01 * normal(32, 3)
    for step in range(100):
        x.requires_grad_()
        value = sigreg.sigreg(x, random_directions(3, 16, step, CPU).double())
        x = x.detach() - 0.5 * torch.autograd.grad(value, x)[0]
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T))
    assert x.mean(dim=0).abs().max() < 0.15
    assert 0.7 < eigenvalues.min() <= eigenvalues.max() < 1.3


def test_directions_are_unit_vectors_of_the_seed():
    one, again, other = (random_directions(8, 500, seed, CPU) for seed in (2**64 - 1, 2**64 - 1, 3))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.norm(dim=0), torch.ones(500))
    torch.testing.assert_close(one @ one.T / 500, torch.eye(8) / 8, rtol=0, atol=0.03)


def views(projection=None, feature=None, seed=5):
    empty = torch.empty(0)
    return Views(
        NONE, NONE, feature, NONE, NONE, empty, 0.04, seed=seed,
        student_projection=empty if projection is None else projection,
    )  # fmt: skip


def test_the_spreading_term_is_the_mean_over_global_crops_with_the_directions_of_the_step():
    x = normal(2, 6, 4).float()
    loss = sigreg.build(sigreg.Config(directions=8))
    first, second = (sigreg.sigreg(crop, random_directions(4, 8, 5, CPU)) for crop in x)
    torch.testing.assert_close(loss(views(feature=x)), (first + second) / 2)
    assert not torch.equal(loss(views(feature=x)), loss(views(feature=x, seed=6)))


def test_lejepa_is_the_distance_from_the_mean_of_the_global_crops_and_sigreg():
    z = normal(3, 4, 2).float()  # two global crops and a local one
    squares = []
    for b in range(4):
        for p in range(2):
            middle = (z[0, b, p].item() + z[1, b, p].item()) / 2
            squares += [(z[s, b, p].item() - middle) ** 2 for s in range(3)]
    spread = sigreg.sigreg(z, random_directions(2, 8, 5, CPU)).item()
    loss = lejepa.build(lejepa.Config(directions=8, spread=0.25))
    got = loss(views(z, torch.empty(2, 4, 7))).item()
    assert got == pytest.approx(0.75 * sum(squares) / len(squares) + 0.25 * spread, rel=1e-5)


def test_directions_are_a_function_of_seed_and_step():
    words = [
        "losses.sigreg.directions=4",
        "crops.globals.size=32",
        "crops.locals.size=16",
        "backbone.size=32",
    ]
    model = StudentTeacher(load_recipe("scenes_cpu", words))
    crops, none = torch.randn(8, 3, 32, 32), torch.zeros(0, dtype=torch.int64)

    def value(step, seed=0):
        model.seed = seed
        batch = Batch(step, 4, crops, torch.zeros(0, 3, 16, 16), none, none, None, none, torch.zeros(0))
        return model(batch, 0.05, ["sigreg"])["sigreg"].item()

    first = value(3)
    torch.manual_seed(7)  # of a process: another draw of its own changes nothing
    assert value(3) == first
    assert len({first, value(4), value(3, seed=1), value(4, seed=1)}) == 4


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"spread=1.5: it must be from 0 to 1"):
        lejepa.Config(spread=1.5)
    with pytest.raises(ValueError, match=r"directions=0"):
        load_recipe("scenes_cpu", ["losses.sigreg.directions=0"])
    with pytest.raises(ValueError, match=r"losses.lejepa compares projections"):
        load_recipe("eurosat_dinov2_cpu", ["data.path=x", "losses.lejepa={}"])
