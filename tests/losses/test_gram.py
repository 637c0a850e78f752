"""gram() against loops over Python floats, its closed-form gradient, and what it must not see."""

import math

import pytest
import torch

from dinokit.config.load import load_recipe
from dinokit.losses import Views
from dinokit.losses.gram import Config, build, gram, gram_by_channels
from dinokit.models.head import LazyLogits

NONE = LazyLogits(torch.empty(0, 1), torch.empty(0, 1))


def patches(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(student, teacher, clamp):
    """The definition, one pair of patches at a time."""
    total, count = 0.0, 0
    for x, y in zip(student.tolist(), teacher.tolist(), strict=True):
        x, y = ([[v / math.hypot(*row) for v in row] for row in rows] for rows in (x, y))
        for i in range(len(x)):
            for j in range(len(x)):
                ours = sum(a * b for a, b in zip(x[i], x[j], strict=True))
                theirs = sum(a * b for a, b in zip(y[i], y[j], strict=True))
                negative = theirs < 0
                if clamp != "none":
                    theirs = max(theirs, 0.0)
                if clamp == "both" or (clamp == "pairs" and negative):
                    ours = max(ours, 0.0)
                total, count = total + (ours - theirs) ** 2, count + 1
    return total / count


@pytest.mark.parametrize("clamp", ["none", "both", "teacher", "pairs"])
def test_equals_the_definition(clamp):
    x, y = patches(2, 5, 3), patches(2, 5, 4, seed=1)
    assert gram(x, y, clamp).item() == pytest.approx(by_hand(x, y, clamp), rel=1e-9)


def test_the_clamps_differ():
    x, y = patches(2, 5, 3), patches(2, 5, 3, seed=1)
    assert len({round(gram(x, y, clamp).item(), 9) for clamp in ("none", "both", "teacher", "pairs")}) == 4


@pytest.mark.parametrize("shape", [(2, 7, 3), (1, 3, 7), (3, 16, 16)])
def test_the_form_by_channels_is_the_same_in_value_and_gradient(shape):
    results = []
    for form in (gram, gram_by_channels):
        x = patches(*shape).requires_grad_()
        value = form(x, patches(*shape, seed=1))
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", [gram, gram_by_channels])
def test_the_gradient_is_that_of_the_closed_form(form):
    """4 (x x' - y y') x / (b N^2) for rows of length one, without its part along each row."""
    x = torch.nn.functional.normalize(patches(2, 6, 4), dim=-1).requires_grad_()
    y = torch.nn.functional.normalize(patches(2, 6, 4, seed=1), dim=-1)
    form(x, y).backward()
    with torch.no_grad():
        want = 4 * (x @ x.mT - y @ y.mT) @ x / (2 * 6**2)
        want = want - (want * x).sum(dim=-1, keepdim=True) * x
    torch.testing.assert_close(x.grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", [gram, gram_by_channels])
def test_lengths_and_rotations_have_no_effect(form):
    x = patches(2, 9, 4)
    rotation = torch.linalg.qr(patches(4, 4, seed=2)).Q
    assert form(x, x @ rotation * 3).item() == pytest.approx(0, abs=1e-14)
    assert form(x, patches(2, 9, 4, seed=3)) > 0.01


def test_a_small_loss_keeps_its_digits_in_float32():
    x = patches(1, 300, 16)
    y = x + 1e-3 * patches(1, 300, 16, seed=1)
    exact = gram(x, y).item()
    assert 1e-8 < exact < 1e-5
    assert gram_by_channels(x.float(), y.float()).item() == pytest.approx(exact, rel=1e-3)


def views(student, teacher) -> Views:
    empty = torch.empty(0)
    return Views(NONE, NONE, empty, NONE, NONE, empty, 0.07, student_patches=student, gram_patches=teacher)


def test_the_loss_takes_the_smaller_form_and_the_level(monkeypatch):
    few, many = (patches(2, 3, 8), patches(2, 3, 8, seed=1)), (patches(2, 9, 4), patches(2, 9, 4, seed=1))
    forms = []
    for name in ("gram", "gram_by_channels"):
        real = {"gram": gram, "gram_by_channels": gram_by_channels}[name]
        monkeypatch.setattr(
            f"dinokit.losses.gram.{name}", lambda *a, real=real, name=name: (forms.append(name), real(*a))[1]
        )
    assert build(Config())(views(*few)).item() == pytest.approx(gram(*few).item())
    assert build(Config())(views(*many)).item() == pytest.approx(gram(*many).item())
    build(Config(clamp="both"))(views(*many))
    assert forms == ["gram", "gram_by_channels", "gram"]
    flat = [x.flatten(0, 1)[None] for x in few]
    assert build(Config(level="batch"))(views(*few)).item() == pytest.approx(gram(*flat).item())


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="never computes a similarity"):
        Config(form="channels", clamp="both")
    for settings, words in (
        (["losses.gram.weight=1"], r"losses.gram needs a Gram teacher"),
        (["teacher.gram.weights=x"], r"no loss reads it"),
        (["losses.gram.weight=1", "teacher.gram.refreshes=2", "crops.gram_size=96"], r"weights of its own"),
        (["losses.gram.weight=1", "teacher.gram.refresh_every=5"], r"is the moving average"),
        (["losses.gram.weight=1", "teacher.gram.refresh_from=7"], r"refresh_from has no effect without"),
        (["losses.gram.weight=1", "teacher.gram.refreshes=2"], r"refreshes has no effect without"),
    ):
        with pytest.raises(ValueError, match=words):
            load_recipe("scenes_cpu", settings)
