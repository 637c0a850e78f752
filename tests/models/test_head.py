"""The projection head."""

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from dinokit.models.head import PrototypeHead, Prototypes, standardized


@pytest.mark.parametrize(
    ("width", "prototypes", "bottleneck", "count"),
    [
        (384, 65_536, 256, 22_352_128),
        (768, 65_536, 256, 23_138_560),
        (1024, 65_536, 256, 23_662_848),
        (1536, 131_072, 384, 58_593_664),
        (1536, 131_072, 256, 41_554_176),
    ],
)
def test_it_has_as_many_parameters_as_the_published_ones(width, prototypes, bottleneck, count):
    with torch.device("meta"):
        head = PrototypeHead(width, prototypes, 2048, bottleneck, 3, norm_last_layer=False)
    assert sum(p.numel() for p in head.parameters()) == count


def test_prototypes_are_a_weight_normalised_linear_layer(generator):
    ours = Prototypes(5, 7, norm_last_layer=False)
    with torch.no_grad():
        ours.weight_g.copy_(torch.rand(7, 1, generator=generator))
    theirs = weight_norm(torch.nn.Linear(5, 7, bias=False), dim=0)
    theirs.parametrizations.weight.original0.data.copy_(ours.weight_g)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight_v)
    x = torch.randn(3, 5, generator=generator)
    torch.testing.assert_close(x @ ours(torch.float32).T, theirs(x))
    (x @ ours(torch.float32).T).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)


def test_prototypes_in_half_precision_are_those_in_float32_rounded(generator):
    ours = Prototypes(5, 7, norm_last_layer=False)
    assert torch.equal(ours(torch.bfloat16), ours(torch.float32).bfloat16())
    out = torch.randn(7, 5, generator=generator).bfloat16()
    grads = [
        torch.autograd.grad((ours(dtype) * out).float().sum(), ours.weight_v)[0]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


def test_logits_are_cosines_at_the_start(generator):
    module = PrototypeHead(6, 50, 16, 8, 3, norm_last_layer=True)
    x = module(torch.randn(100, 6, generator=generator) * 100).logits()
    assert x.abs().max() <= 1 + 1e-6
    w = torch.nn.functional.normalize(module.last_layer.weight_v, dim=1)
    torch.testing.assert_close((w @ module.last_layer(torch.float32).T).diagonal(), torch.ones(50))


def test_a_held_length_is_not_trained():
    assert not Prototypes(4, 5, norm_last_layer=True).weight_g.requires_grad
    assert Prototypes(4, 5, norm_last_layer=False).weight_g.requires_grad


def test_half_precision_features_of_length_zero_stay_finite():
    head = PrototypeHead(4, 5, 8, 3, 1, norm_last_layer=False).half()
    assert head(torch.zeros(2, 4, dtype=torch.float16)).logits().isfinite().all()


def test_standardized_is_batch_norm_without_parameters(generator):
    x = torch.randn(3, 20, 6, generator=generator, requires_grad=True)
    norm = torch.nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    out = torch.randn(3, 20, 6, generator=generator)
    torch.testing.assert_close(standardized(x), norm(x.view(60, 6)).view(x.shape))
    grads = [
        torch.autograd.grad((y * out.view(y.shape)).sum(), x)[0]
        for y in (standardized(x), norm(x.view(60, 6)))
    ]
    torch.testing.assert_close(*grads)
    assert standardized(torch.ones(1, 6)).equal(torch.zeros(1, 6))
    assert standardized(torch.ones(0, 6)).shape == (0, 6)


def test_what_all_rows_share_does_not_reach_a_head_that_standardizes(generator):
    head = PrototypeHead(6, 50, 16, 8, 3, norm_last_layer=False, standardize=True)
    x = torch.randn(40, 6, generator=generator)
    torch.testing.assert_close(head(3 * x + 70).rows, head(x).rows, rtol=1e-3, atol=1e-3)
    plain = PrototypeHead(6, 50, 16, 8, 3, norm_last_layer=False)
    assert (plain(3 * x + 70).rows - plain(x).rows).abs().max() > 0.1
