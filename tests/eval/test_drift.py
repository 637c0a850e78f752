"""How far features moved, against cosines of Python floats."""

import math

import pytest
import torch

from dinokit.eval.drift import Config, drift, evaluate
from dinokit.models.vit import Config as ViT
from dinokit.models.vit import build
from dinokit.weights import save_backbone


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def centred(rows: list[list[float]]) -> list[list[float]]:
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [[x - m for x, m in zip(row, means, strict=True)] for row in rows]


def test_equals_the_definition(generator):
    now, then = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64) + 2
    a, b = now.tolist(), then.tolist()
    plain, middle = drift(now, then)
    assert plain.item() == pytest.approx(sum(map(cosine, a, b)) / 7)
    assert middle.item() == pytest.approx(sum(map(cosine, centred(a), centred(b))) / 7)


def test_what_all_images_share_hides_a_loss_from_the_plain_cosine_only(generator):
    shared, own, new = 20 * torch.ones(50, 8), *torch.randn(2, 50, 8, generator=generator)
    plain, middle = drift(shared + new, shared + own)
    assert plain > 0.99
    assert abs(middle) < 0.2


def test_a_length_is_no_drift(generator):
    x = torch.randn(6, 4, generator=generator)
    assert drift(3 * x, x)[0].item() == pytest.approx(1)
    assert drift(3 * x, x)[1].item() == pytest.approx(1)


@pytest.fixture
def backbones(tmp_path):
    backbones = []
    for seed, width in ((0, 24), (1, 24), (2, 12)):
        torch.manual_seed(seed)
        values = {"size": 32, "width": width, "depth": 1, "heads": 2, "patch": 8, "layer_scale": 1.0}
        backbones.append(build(ViT(**values)).eval())
        save_backbone(tmp_path / f"{seed}.safetensors", backbones[-1], {"name": "vit", **values})
    return backbones


def test_the_same_weights_have_not_moved_and_others_have(backbones, tmp_path):
    test = {"name": "scenes", "count": 10, "test_count": 10, "split": "test"}
    for i, same in ((0, True), (1, False)):
        cfg = Config(test=test, against=str(tmp_path / f"{i}.safetensors"), workers=0, precision="fp32")
        scores = evaluate(cfg, backbones[0])
        assert scores["images_test"] == 10
        assert (scores["cosine"] == pytest.approx(1)) == same
        assert (scores["cosine_centred"] == pytest.approx(1)) == same
    cfg = Config(test=test, against=str(tmp_path / "2.safetensors"), workers=0)
    with pytest.raises(ValueError, match="features of 12 numbers, and these weights have 24"):
        evaluate(cfg, backbones[0])
