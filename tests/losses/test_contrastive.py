"""losses/contrastive.py against a loop over Python floats, and at its two ends."""

import math

import pytest
import torch

from dinokit.losses.contrastive import info_nce


def loop(z: list[list[list[float]]], crops: int, temperature: float) -> float:
    """The formula of info_nce, one pair and one image at a time."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    terms = []
    for s in range(len(z)):
        for g in range(crops):
            if s == g:
                continue
            for b, row in enumerate(z[s]):
                likeness = [cosine(row, other) / temperature for other in z[g]]
                terms.append(math.log(sum(math.exp(x) for x in likeness)) - likeness[b])
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("crops", "temperature"), [(2, 0.2), (1, 0.1), (3, 1.0)])
def test_equals_a_loop_over_floats(crops: int, temperature: float) -> None:
    z = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert info_nce(z, crops, temperature).item() == pytest.approx(loop(z.tolist(), crops, temperature))


def test_is_ln_b_where_all_images_are_alike_and_zero_where_each_is_apart() -> None:
    assert info_nce(torch.ones(3, 8, 4), 2, 0.2).item() == pytest.approx(math.log(8), rel=1e-6)
    apart = torch.eye(8).expand(3, 8, 8)
    assert info_nce(apart, 2, 0.01).item() == pytest.approx(0, abs=1e-6)
