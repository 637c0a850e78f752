"""Correspondence of points: features that encode the place, shuffled ones, and a loop over floats."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.eval._dense import DenseBackbone
from dinokit.eval._patches import patches_of
from dinokit.eval.correspondence import evaluate, matched, nearest_patches, same_place

SCENES = {"name": "scenes", "size": 64, "pairs": 4}


def config(**values):
    module = registry.find("eval", "correspondence")
    return module.Config(**section_values("eval", "correspondence", values, ""))


def place_features(h, w, freedom=16):
    """(D, h, w): cosines and sines of the place, so that near places are similar and no two alike."""
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    waves = [
        f(axis * k / freedom)
        for axis in (x / w, y / h)
        for k in range(1, freedom)
        for f in (torch.cos, torch.sin)
    ]
    return torch.stack(waves)


def test_features_of_the_place_find_it():
    features = place_features(6, 9)
    middles = torch.tensor([[x + 0.5, y + 0.5] for x in range(9) for y in range(6)]).double()
    assert torch.equal(nearest_patches(features, features, middles), middles)
    beside = middles + 0.3 * (torch.rand(middles.shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert torch.equal(nearest_patches(features, features, beside), middles)
    assert torch.equal(nearest_patches(features, features.flip(2), middles)[:, 0], 9 - middles[:, 0])


def test_answers_are_those_of_a_loop():
    torch.manual_seed(0)
    first, second = torch.randn(5, 4, 6), torch.randn(5, 3, 7)
    points = torch.rand(20, 2).double() * torch.tensor([6, 4])
    for (x, y), answer in zip(points.tolist(), nearest_patches(first, second, points).tolist(), strict=True):
        x, y = min(max(x - 0.5, 0), 5), min(max(y - 0.5, 0), 3)  # in numbers of patches
        i, j = min(int(x), 4), min(int(y), 2)
        a, b = x - i, y - j
        query = [
            float(
                f[j][i] * (1 - a) * (1 - b)
                + f[j][i + 1] * a * (1 - b)
                + f[j + 1][i] * (1 - a) * b
                + f[j + 1][i + 1] * a * b
            )
            for f in first
        ]
        best, place = -2.0, None
        for row in range(3):
            for column in range(7):
                key = [float(f[row][column]) for f in second]
                length = math.sqrt(sum(v * v for v in query)) * math.sqrt(sum(v * v for v in key))
                cosine = sum(p * q for p, q in zip(query, key, strict=True)) / length
                if cosine > best:
                    best, place = cosine, [column + 0.5, row + 0.5]
        assert answer == place


def test_shuffled_features_find_by_chance():
    torch.manual_seed(0)
    features = place_features(20, 20)
    points = torch.rand(2000, 2).double() * 20
    shuffled = features.flatten(1)[:, torch.randperm(400)].unflatten(1, (20, 20))
    near = (nearest_patches(features, shuffled, points) - points).norm(dim=1) <= 4
    middles = torch.cartesian_prod(torch.arange(20), torch.arange(20)) + 0.5
    chance = float((torch.cdist(points, middles.double()) <= 4).double().mean())
    assert float(near.double().mean()) == pytest.approx(chance, abs=0.03)
    assert chance < 0.15


@pytest.mark.parametrize("resize", [0, 50, 128])
def test_a_grid_says_where_patches_lie(backbone, resize):
    """A white square of the image is in the patches that its corners say."""
    pixels = np.zeros((60, 84, 3), np.uint8)
    pixels[20:40, 32:56] = 255
    patches, grid = patches_of(DenseBackbone(backbone, [-1], "fp32"), Image.fromarray(pixels), resize)
    (x0, y0), (x1, y1) = grid.to_patches(np.array([[32, 20], [56, 40]]))
    bright = patches[0] > 0
    rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
    assert (columns.min(), columns.max() + 1) == (pytest.approx(x0, abs=1), pytest.approx(x1, abs=1))
    assert (rows.min(), rows.max() + 1) == (pytest.approx(y0, abs=1), pytest.approx(y1, abs=1))
    height, width = {0: (60, 84), 50: (50, 70), 128: (128, 179)}[resize]
    patch = backbone.patch
    pad = [(-side % patch) // 2 / patch for side in (width, height)]  # half of what is missing, in patches
    assert grid.to_patches(np.zeros((1, 2)))[0].tolist() == pad
    corners = np.array([[0.0, 0.0], [84.0, 60.0]])
    assert grid.to_pixels(grid.to_patches(corners)) == pytest.approx(corners)


def test_scores_are_shares_of_points_and_of_pairs(backbone):
    cfg = config(test=SCENES, alpha=[0.1, 0.3])
    source, dense = registry.build("data.pairs", cfg.test), DenseBackbone(backbone, [-1], "fp32")
    found, shares, possible = 0, [], 0
    for index in range(len(source)):
        pair = source[index]
        answers, best = matched(cfg, dense, pair)
        hits = 0
        for k, side in enumerate(pair.sides):
            x, y = pair.points[1, k]
            hits += math.hypot(answers[k, 0] - x, answers[k, 1] - y) <= 0.3 * side
            possible += math.hypot(best[k, 0] - x, best[k, 1] - y) <= 0.3 * side
        found += hits
        shares.append(hits / len(pair.sides))
    got = evaluate(cfg, backbone)
    assert got["PCK@0.3"] == pytest.approx(found / got["points"])
    assert got["PCK@0.3 by pair"] == pytest.approx(sum(shares) / 4)
    assert got["ceiling@0.3"] == pytest.approx(possible / got["points"])
    assert got["PCK@0.1"] <= got["PCK@0.3"] <= got["ceiling@0.3"]
    assert got["pairs"] == 4


@pytest.fixture
def one_image(tmp_path):
    """SPair-71k's layout with the same image twice."""
    for folder in ("JPEGImages/cat", "PairAnnotation/test", "Layout/large"):
        (tmp_path / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(pixels).save(tmp_path / "JPEGImages/cat/a.png")
    points = [[12, 12], [52, 20], [36, 44]]
    text = (
        f'{{"src_imname": "a.png", "trg_imname": "a.png", "category": "cat", "src_kps": {points}, '
        f'"trg_kps": {points}, "trg_bndbox": [0, 0, 30, 20]}}'
    )
    (tmp_path / "PairAnnotation/test/1.json").write_text(text)
    (tmp_path / "Layout/large/test.txt").write_text("1")
    return {"name": "spair", "path": str(tmp_path)}


def test_an_image_is_found_in_itself(one_image, backbone):
    got = evaluate(config(test=one_image), backbone)
    want = {"PCK@0.1": 1, "PCK@0.1 by pair": 1, "ceiling@0.1": 1, "points": 3, "pairs": 1}
    assert got == want


def test_the_same_place_is_a_share_of_the_sides():
    pair = registry.build("data.pairs", SCENES)[0]
    assert np.array_equal(same_place(pair)[0], pair.points[0])  # images of one size
    other = replace(pair, first=Image.new("RGB", (40, 20)), second=Image.new("RGB", (80, 60)))
    assert same_place(other)[0] == pytest.approx(pair.points[0] * [2, 3])
    pixels = registry.build("models", {"name": "pixels"}).eval()
    got = evaluate(config(method="same", test=SCENES), pixels)
    assert set(got) == {"PCK@0.1", "PCK@0.1 by pair", "points", "pairs"}
    assert got["PCK@0.1"] < 0.5


def test_wrong_settings_get_words(one_image, backbone, tmp_path):
    with pytest.raises(ValueError, match=r"alpha=\[0\.0\]"):
        config(alpha=[0.0], test=SCENES)
    with pytest.raises(ValueError, match="resize: only with method=nearest"):
        config(method="same", resize=8, test=SCENES)
    file = tmp_path / "PairAnnotation/test/1.json"
    file.write_text(file.read_text().replace(str([[12, 12], [52, 20], [36, 44]]), "[]"))
    with pytest.raises(ValueError, match=r"The pairs \(spair\) have no point"):
        evaluate(config(test=one_image), backbone)


@pytest.fixture
def backbone():
    return registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}).eval()
