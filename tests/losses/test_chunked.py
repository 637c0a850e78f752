"""The sliced forms against the plain ones, in values and gradients."""

import math
from functools import partial

import pytest
import torch

from dinokit.losses import Views, chunked, dino, ibot
from dinokit.losses.chunked import cross_entropy, prototype_slices, sinkhorn_knopp
from dinokit.models.head import LazyLogits


@pytest.fixture(params=[1, 40, 10**6])
def chunk(request, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK", request.param)
    return request.param


def make(shape, k, generator, grad=False):
    rows = torch.nn.functional.normalize(torch.randn(*shape, 8, generator=generator), dim=-1)
    prototypes = torch.randn(k, 8, generator=generator) / 3
    return LazyLogits(rows.requires_grad_(grad), prototypes.requires_grad_(grad))


def both_ways(build, views):
    """Value and gradients of the student's four tensors, from whole logits and in slices."""
    results = []
    leaves = [x for s in (views.student_cls, views.student_patch) for x in (s.rows, s.prototypes)]
    for views.whole_logits in (True, False):
        value = build()(views)
        grads = torch.autograd.grad(1.7 * value, leaves, allow_unused=True)
        results.append((value.detach(), [g for g in grads if g is not None]))
    return results


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
@pytest.mark.parametrize(("crops", "masked"), [((2, 5), 7), ((2, 2), 0), ((1, 3), 1)])
@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_both_losses_are_the_same_whole_and_in_slices(name, kind, crops, masked, chunk, generator):
    (teachers, students), module = crops, {"dino": dino, "ibot": ibot}[name]
    views = Views(
        make((students, 4), 33, generator, grad=True), make((teachers, 4), 33, generator),
        torch.zeros(0), make((masked,), 21, generator, grad=True), make((masked,), 21, generator),
        torch.rand(masked, generator=generator), teacher_temp=0.05,
    )  # fmt: skip
    weights = {"local_weight": 0.5} if name == "dino" else {}
    build = partial(module.build, module.Config(targets=kind, **weights), {"cls": 33, "patch": 21})
    (want, want_grads), (got, got_grads) = both_ways(build, views)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(want_grads) == 2
    for one, two in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_no_tensor_of_all_student_logits_is_ever_made(generator, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK", 64)
    student, teacher = make((3, 4), 500, generator, grad=True), make((2, 4), 500, generator)
    targets = sinkhorn_knopp([teacher], 0.1)[0]
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.untyped_storage().size() if out._base is None else 0)
            return out

    pairs, weight = torch.ones(3, 2), torch.ones(4)
    with Watch():
        cross_entropy(student, targets, pairs, weight, 0.1).backward()
    assert max(largest) <= 500 * 8 * 4  # bytes: nothing is larger than the prototypes and their gradient
    assert 3 * 4 * 500 > 500 * 8


def test_a_target_of_a_crop_that_it_is_not_paired_with_does_not_matter(generator):
    student, teacher = make((2, 3), 9, generator, grad=True), make((2, 3), 9, generator)
    targets, pairs = sinkhorn_knopp([teacher], 0.1)[0], torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    cross_entropy(student, targets, pairs, torch.ones(3), 0.1).backward()
    assert student.rows.grad[1].abs().max() == 0
    before = student.rows.grad.clone()
    targets.slices[0][:3] = 1 / 9
    student.rows.grad = None
    cross_entropy(student, targets, pairs, torch.ones(3), 0.1).backward()
    torch.testing.assert_close(student.rows.grad, before, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [(0,), (3, 5), (7,)])
def test_slices_are_all_prototypes_once_and_small_for_whoever_has_most_rows(rows):
    lazy = LazyLogits(torch.zeros(*rows, 2), torch.zeros(chunked.CPU_CHUNK // 3, 2))
    parts = prototype_slices(LazyLogits(torch.zeros(2, 2), lazy.prototypes), lazy)
    covered = [i for part in parts for i in range(part.start, part.stop)]
    assert covered == list(range(len(lazy.prototypes)))
    assert all((part.stop - part.start) * math.prod(rows) <= chunked.CPU_CHUNK for part in parts)


@pytest.mark.parametrize(
    ("balanced", "counts"), [(["cls", "patch"], [2]), (["cls"], [1, 1]), (["patch"], [2]), ([], [1, 1])]
)
def test_only_heads_that_a_loss_balances_are_balanced_and_each_once(balanced, counts, generator, monkeypatch):
    """The class token's targets are asked for first; those of patches are still to be had."""
    cls, patch = make((2, 4), 33, generator), make((7,), 21, generator)
    want, calls = sinkhorn_knopp([cls, patch], 0.05), []
    monkeypatch.setattr(
        chunked,
        "sinkhorn_knopp",
        lambda heads, *a, **k: calls.append(len(heads)) or sinkhorn_knopp(heads, *a, **k),
    )
    views = Views(cls, cls, torch.zeros(0), patch, patch, torch.zeros(7), 0.05, balanced=balanced)
    for head, expected in zip(("cls", "patch", "cls"), (*want, want[0]), strict=True):
        assert torch.equal(views.balanced_targets(head).probabilities(), expected.probabilities())
    assert calls == counts
