"""kernel_alignment() against CKA from features, a loop over floats, and what it must not see."""

import math

import pytest
import torch

from dinokit.config.load import load_recipe
from dinokit.losses import Views
from dinokit.losses.kernel_alignment import Config, build, kernel_alignment
from dinokit.models.head import LazyLogits


def patches(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_features(x, y):
    """1 - |X'Y|^2 / (|X'X| |Y'Y|) of one crop with centred columns, one number at a time."""

    def centred(rows):
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        return [[v - m for v, m in zip(row, means, strict=True)] for row in rows]

    def squares(a, b):
        pairs = [(i, j) for i in range(len(a[0])) for j in range(len(b[0]))]
        return sum(sum(r[i] * s[j] for r, s in zip(a, b, strict=True)) ** 2 for i, j in pairs)

    x, y = centred(x.tolist()), centred(y.tolist())
    return 1 - squares(x, y) / math.sqrt(squares(x, x) * squares(y, y))


@pytest.mark.parametrize(("count", "width", "other"), [(5, 3, 3), (4, 6, 2), (9, 2, 7)])
def test_is_one_minus_cka(count, width, other):
    x, y = patches(2, count, width), patches(2, count, other, seed=1)
    want = sum(by_features(a, b) for a, b in zip(x, y, strict=True)) / 2
    assert kernel_alignment(x, y).item() == pytest.approx(want, rel=1e-10)
    assert 0 < want < 1


def test_a_rotation_a_scale_and_a_shift_have_no_effect():
    x = patches(2, 9, 4)
    rotation = torch.linalg.qr(patches(4, 4, seed=2)).Q
    moved = 3 * x @ rotation + patches(1, 1, 4, seed=3)
    for scale in (1, 1e-3, 1e3):
        assert kernel_alignment(scale * moved, scale * x).item() == pytest.approx(0, abs=1e-12)
    assert kernel_alignment(x * torch.tensor([1, 1, 1, 5]), x) > 0.05


def test_two_patches_always_agree_and_unrelated_directions_never():
    assert kernel_alignment(patches(1, 2, 3), patches(1, 2, 3, seed=1)).item() == pytest.approx(0, abs=1e-12)
    along, across = torch.tensor([[1.0, 1, -1, -1]]).mT[None], torch.tensor([[1.0, -1, 1, -1]]).mT[None]
    assert kernel_alignment(along, across).item() == pytest.approx(1)


def test_patches_that_are_all_alike_have_a_finite_gradient():
    x = torch.ones(1, 4, 3, requires_grad=True)
    value = kernel_alignment(x, patches(1, 4, 3).float())
    value.backward()
    assert value.item() == 1
    assert x.grad.isfinite().all()


def test_a_step_downhill_brings_the_structures_together():
    x, y = patches(1, 9, 4).requires_grad_(), patches(1, 9, 4, seed=1)
    kernel_alignment(x, y).backward()
    assert kernel_alignment(x.detach() - 0.1 * x.grad, y) < kernel_alignment(x.detach(), y)


def test_the_loss_reads_the_gram_teacher_and_asks_for_it():
    none, empty = LazyLogits(torch.empty(0, 1), torch.empty(0, 1)), torch.empty(0)
    x, y = patches(2, 5, 3), patches(2, 5, 4, seed=1)
    views = Views(none, none, empty, none, none, empty, 0.04, student_patches=x, gram_patches=y)
    assert build(Config())(views).item() == kernel_alignment(x, y).item()
    with pytest.raises(ValueError, match=r"losses.kernel_alignment needs a Gram teacher"):
        load_recipe("scenes_cpu", ["losses.kernel_alignment={}"])
    assert load_recipe("scenes_cpu", ["losses.kernel_alignment={}", "teacher.gram.refreshes=3"])
