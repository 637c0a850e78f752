"""after_norm() and project() against their operations one by one, and what they keep of them."""

import pytest
import torch
import torch.nn.functional as F

from dinokit.models.linear import LayerScale, after_norm, project


def kept(run):
    """Storages of at least as many numbers as the hidden rows, kept for the backward pass, and the result."""
    found = {}

    def pack(x):
        if x.numel() >= 40 * 12:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return len(found), out


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
def test_values_and_gradients_are_those_of_the_operations_one_by_one(gelu, with_gain):
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 5).double()
    scale = LayerScale(5, 1.0).double() if with_gain else None
    if scale:
        torch.nn.init.normal_(scale.gamma)
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, linear.weight, linear.bias, *([scale.gamma] if scale else [])]
    want = linear(F.gelu(x) if gelu else x) * (scale.gamma if scale else 1)
    got = project(x, linear, scale, gelu=gelu)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_result_of_the_gelu_is_not_kept():
    linear = torch.nn.Linear(12, 5)
    x = torch.randn(40, 12, requires_grad=True)
    assert kept(lambda: project(x, linear, None, gelu=True))[0] == 1
    assert kept(lambda: linear(F.gelu(x)))[0] == 2


def norm_and_linear(dtype):
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(12, eps=1e-6).to(dtype), torch.nn.Linear(12, 5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm, linear, (3 * torch.randn(40, 12, dtype=dtype) + 1).requires_grad_()


def test_a_norm_and_its_layer_are_those_two_one_by_one():
    norm, linear, x = norm_and_linear(torch.float64)
    inputs = [x, norm.weight, norm.bias, linear.weight, linear.bias]
    weights = torch.randn(40, 5, dtype=torch.float64)
    got, want = after_norm(x, norm, linear), linear(norm(x))
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_sees_the_same_casts_as_in_the_two_one_by_one():
    norm, linear, x = norm_and_linear(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = after_norm(x, norm, linear), linear(norm(x))
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    inputs = [x, norm.weight, linear.weight]
    ours, theirs = (torch.autograd.grad(out.float().sum(), inputs) for out in (got, want))
    torch.testing.assert_close(ours, theirs)
    assert {g.dtype for g in ours} == {torch.float32}


def test_the_result_of_the_norm_is_not_kept():
    norm, linear, x = norm_and_linear(torch.float32)
    assert kept(lambda: after_norm(x, norm, linear))[0] == 1
    assert kept(lambda: linear(norm(x)))[0] == 2


def test_a_tiny_gain_survives_fp16():
    linear, scale = torch.nn.Linear(12, 5).half(), LayerScale(5, 1e-6)
    x = torch.randn(40, 12).half()
    want = linear(x).float() * 1e-6
    torch.testing.assert_close(project(x, linear, scale), want)
    folded = F.linear(
        x, linear.weight * scale.gamma.half()[:, None], linear.bias * scale.gamma.half()
    ).float()
    assert not torch.allclose(folded, want, rtol=1e-2)  # what it must not be computed from


def test_an_adapter_in_the_place_of_the_layer_is_called():
    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Twice(12, 5), torch.randn(40, 12)
    torch.testing.assert_close(
        project(x, layer, LayerScale(5, 3.0)), 6 * F.linear(x, layer.weight, layer.bias)
    )
