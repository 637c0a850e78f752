"""The projection head."""

import math

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from dinokit.layers.head import CPU_CHUNK, PrototypeHead, Prototypes, Scores


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
    torch.testing.assert_close(x @ ours().T, theirs(x))


def test_logits_are_cosines_at_the_start(generator):
    head = PrototypeHead(6, 50, 16, 8, 3, norm_last_layer=True)
    x = head(torch.randn(100, 6, generator=generator) * 100).logits()
    assert x.abs().max() <= 1 + 1e-6
    w = torch.nn.functional.normalize(head.last_layer.weight_v, dim=1)
    torch.testing.assert_close((w @ head.last_layer().T).diagonal(), torch.ones(50))


def test_a_held_length_is_not_trained():
    assert not Prototypes(4, 5, norm_last_layer=True).weight_g.requires_grad
    assert Prototypes(4, 5, norm_last_layer=False).weight_g.requires_grad


def test_half_precision_features_of_length_zero_stay_finite():
    head = PrototypeHead(4, 5, 8, 3, 1, norm_last_layer=False).half()
    assert head(torch.zeros(2, 4, dtype=torch.float16)).logits().isfinite().all()


@pytest.mark.parametrize("rows", [(0,), (3, 5), (7,)])
def test_the_parts_are_all_prototypes_once(rows):
    scores = Scores(torch.zeros(*rows, 2), torch.zeros(CPU_CHUNK // 3, 2))
    covered = [i for part in scores.parts() for i in range(part.start, part.stop)]
    assert covered == list(range(len(scores.prototypes)))
    assert all((part.stop - part.start) * math.prod(rows) <= CPU_CHUNK for part in scores.parts())
