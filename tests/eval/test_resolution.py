"""Segmentation at sizes that the bank of patches was not filled at, and the cosine between sizes."""

import numpy as np
import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.eval.segmentation import Config, cosines_on_one_grid, evaluate

SCENES = {
    "train": {"name": "scenes", "size": 64, "split": "train"},
    "test": {"name": "scenes", "size": 64, "split": "test"},
    "method": "knn", "resize": 64, "max_train": 4, "max_test": 3, "workers": 0, "precision": "fp32",
}  # fmt: skip


def scores(backbone, **values):
    return evaluate(Config(**section_values("eval", "segmentation", {**SCENES, **values}, "")), backbone)


def test_cosines_are_on_the_smaller_grid():
    torch.manual_seed(0)
    small = torch.randn(1, 5, 3, 4)
    twice = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    smooth = torch.ones(1, 5, 6, 8) * torch.arange(1.0, 6)[None, :, None, None]
    assert torch.allclose(cosines_on_one_grid(smooth, smooth[..., ::2, ::2]), torch.ones(1, 3, 4))
    assert cosines_on_one_grid(small, twice).shape == (1, 3, 4)
    assert torch.allclose(cosines_on_one_grid(small, -small), -torch.ones(1, 3, 4))
    a, b = torch.randn(1, 5, 3, 4), torch.randn(1, 5, 3, 4)
    got = cosines_on_one_grid(a, b)
    for i, j in np.ndindex(3, 4):
        p, q = a[0, :, i, j].tolist(), b[0, :, i, j].tolist()
        dot, lengths = (
            sum(x * y for x, y in zip(p, q, strict=True)),
            [sum(x * x for x in v) ** 0.5 for v in (p, q)],
        )
        assert float(got[0, i, j]) == pytest.approx(dot / lengths[0] / lengths[1], abs=1e-5)


def test_each_size_has_a_score_of_its_own(backbone):
    got = scores(backbone, sizes=[1.0, 2.0])
    assert got["mIoU x1"] == got["mIoU"]
    assert got["cosine x1"] == pytest.approx(1, abs=1e-6)
    assert got["mIoU x2"] == pytest.approx(scores(backbone, scales=[2.0])["mIoU"])
    assert 0 < got["cosine x2"] < 1


def test_sizes_are_for_neighbours_alone():
    with pytest.raises(ValueError, match="sizes: only with method=knn"):
        section_values("eval", "segmentation", {"method": "linear", "sizes": [2.0]}, "")


@pytest.fixture
def backbone():
    return registry.build("models", {"name": "raw_patches", "size": 64, "patch": 8, "cell": 4}).eval()
