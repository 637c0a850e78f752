"""Label propagation, outlines, patch banks and dense features against their definitions, one by one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from dinokit.config import registry
from dinokit.eval._dense import labels_of_nearest
from dinokit.eval._metrics import contour, dilated, outline, region
from dinokit.eval.segmentation import (
    PatchBank,
    grid_to_image,
    knn_classifier,
    patch_counts,
    regression_classifier,
)
from dinokit.eval.video import _neighbourhood
from dinokit.features import dense, last_blocks, spread_blocks
from dinokit.models.raw_patches import Config, RawPatches


def test_labels_propagate_as_defined():
    torch.manual_seed(0)
    grid, d, frames = (4, 5), 8, 3
    n = grid[0] * grid[1]
    x = F.normalize(torch.randn(n, d), dim=1)
    past, shares = F.normalize(torch.randn(frames, n, d), dim=2), torch.rand(frames, n, 3)
    keys, labels = past.flatten(0, 1), shares.flatten(0, 1)
    got = labels_of_nearest(x, keys, labels, 4, 0.1, _neighbourhood(grid, 1, x.device))
    for i in range(n):
        found = [
            (float(x[i] @ past[r, j]), shares[r, j])
            for r in range(frames)
            for j in range(n)
            if abs(i // 5 - j // 5) <= 1 and abs(i % 5 - j % 5) <= 1
        ]
        found.sort(key=lambda pair: -pair[0])
        weights = [math.exp(c / 0.1) for c, _ in found[:4]]
        want = sum(w * s for w, (_, s) in zip(weights, found, strict=False)) / sum(weights)
        assert torch.allclose(got[i], want, atol=1e-5)


def test_region_and_contour_of_squares():
    a, b = torch.zeros(100, 100, dtype=torch.bool), torch.zeros(100, 100, dtype=torch.bool)
    a[20:60, 20:60], b[20:60, 40:80] = True, True
    assert region(a, b) == pytest.approx(800 / 2400)
    assert (region(a, a), contour(a, a)) == (1, 1)
    shifted = a.roll(2, 0)  # within ceil(0.008 * 141.4) = 2 pixels
    assert contour(shifted, a) == 1
    assert 0 < contour(a.roll(5, 0), a) < 1
    empty = torch.zeros_like(a)
    assert (contour(empty, empty), contour(empty, a), region(empty, empty)) == (1, 0, 1)
    frame = outline(a)  # one pixel thick, above and to the left of where the mask changes
    assert (frame.sum(), frame[19, 19:60].all(), frame[59, 19:60].all()) == (160, True, True)


def test_a_point_grows_to_a_disc():
    point = torch.zeros(11, 11, dtype=torch.bool)
    point[5, 5] = True
    want = [[(i - 5) ** 2 + (j - 5) ** 2 <= 9 for j in range(11)] for i in range(11)]
    assert dilated(point, 3).tolist() == want


def test_pixels_are_counted_by_patch():
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 3, (10, 13))
    got = patch_counts(torch.from_numpy(ids), 4, 3).view(3, 4, 3)
    wide = np.full((12, 16), -1)
    wide[1:11, 1:14] = ids  # an even margin, the odd pixel to the right
    for i in range(3):
        for j in range(4):
            part = wide[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert got[i, j].tolist() == [(part == c).sum() for c in range(3)]


def test_neighbours_vote_by_the_share_of_their_pixels():
    torch.manual_seed(0)
    x, bank = torch.randn(7, 5), PatchBank(torch.randn(40, 5), torch.rand(40, 3), torch.arange(40))
    got = knn_classifier(bank, 6, 0.1)(x)
    cosine = F.normalize(x, dim=1) @ F.normalize(bank.x, dim=1).T
    for q in range(7):
        near = cosine[q].argsort(descending=True)[:6]
        weights = (cosine[q, near] / 0.1).exp()
        assert torch.allclose(got[q], weights @ bank.shares[near] / weights.sum(), atol=1e-5)


def test_regression_on_patches_equals_scikit_learn():
    torch.manual_seed(0)
    y = torch.randint(0, 3, (200,))
    x = torch.randn(200, 4) + torch.eye(4)[y]
    bank = PatchBank(x, F.one_hot(y, 3).float(), torch.arange(200))
    classify, c = regression_classifier(bank, [0.5], 0.1)
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    other = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(z, y.numpy())
    assert c == 0.5
    assert classify(x).numpy() == pytest.approx(other.predict_proba(z), abs=2e-3)


def test_a_patch_of_a_padded_image_lies_where_its_pixels_are():
    rows = torch.arange(12.0)[:, None]
    image = grid_to_image(rows, 10, 13, 4)
    assert image.shape == (1, 10, 13)
    constant = grid_to_image(torch.ones(12, 2), 10, 13, 4)
    assert torch.equal(constant, torch.ones(2, 10, 13))
    assert image[0, 0, 0] == 0
    assert image[0, -1, -1] == pytest.approx(11, abs=0.6)


@pytest.mark.parametrize("norm", [True, False])
def test_dense_maps_are_the_tokens_of_the_padded_image(norm):
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 4, "heads": 2, "patch": 8, "size": 32, "registers": 2}
    vit = registry.build("models", {"name": "vit", "layer_scale": 1.0, **sizes}).eval()
    images = torch.randint(0, 256, (2, 3, 21, 37), dtype=torch.uint8)
    blocks = spread_blocks(vit, 2)
    got = dense(vit, images, blocks, norm=norm)
    x = F.pad((images / 255 - 0.5) / 0.5, (1, 2, 1, 2))
    want = vit.get_intermediate_layers(x, blocks, reshape=True, return_class_token=True, norm=norm)
    assert blocks == [1, 3]
    for m, (patches, cls) in zip(got, want, strict=True):
        assert m.patches.shape == (2, 24, 3, 5)
        assert torch.allclose(m.patches, patches, atol=1e-5)
        assert torch.allclose(m.cls, cls, atol=1e-5)
        assert m.with_cls().shape == (2, 48, 3, 5)
        assert not m.patches.requires_grad
    head = torch.nn.Conv2d(24, 2, 1)
    head(got[0].patches).sum().backward()  # a head can train on them
    assert head.weight.grad is not None


def test_blocks_that_depth_heads_look_into_are_the_released_ones():
    class Deep:
        def __init__(self, depth):
            self.blocks = [None] * depth

    want = {12: [2, 5, 8, 11], 24: [4, 11, 17, 23], 40: [9, 19, 29, 39], 8: [1, 3, 5, 7], 4: [0, 1, 2, 3]}
    assert {depth: spread_blocks(Deep(depth), 4) for depth in want} == want
    assert last_blocks(Deep(12), 4) == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="4 blocks were asked for, but Deep has 3"):
        spread_blocks(Deep(3), 4)


def test_raw_patches_are_the_pixels_of_each_patch():
    x = torch.rand(1, 3, 8, 12)
    tokens = RawPatches(Config(patch=4, cell=2, size=8))([x], [None])[0]
    want = F.avg_pool2d(x, 2)[0, :, 2:4, 4:6].flatten()
    assert torch.allclose(tokens.patches[0, 5], want)
