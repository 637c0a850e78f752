"""RASA against features of known directions and NumPy's least squares, and on a network that knows places."""

import numpy as np
import pytest
import torch

from dinokit.eval.position import (
    Config,
    evaluate,
    linear_fit,
    patch_places,
    position_directions,
    r_squared,
    remove,
)
from dinokit.models import pixels
from dinokit.models.vit import Config as ViT
from dinokit.models.vit import build

IMAGES, SIDE, WIDTH = 200, 6, 12


def synthetic(seed=0):
    """Features e + i v1 + j v2 with independent noise e, their places, and the directions (D, 2)."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    places = patch_places(SIDE, SIDE).repeat(IMAGES, 1)
    return torch.randn(len(places), WIDTH, generator=rng, dtype=torch.float64) + places @ directions.T, places


def test_places_are_rows_and_columns_from_0_to_1():
    assert patch_places(2, 3).tolist() == [[0, 0], [0, 0.5], [0, 1], [1, 0], [1, 0.5], [1, 1]]


def test_the_fit_and_its_r2_are_those_of_numpy():
    x, places = synthetic()
    test_x, test_places = synthetic(1)
    ones = np.ones((len(x), 1))
    solution = np.linalg.lstsq(np.hstack([x.numpy(), ones]), places.numpy(), rcond=None)[0]
    np.testing.assert_allclose(linear_fit(x, places).numpy(), solution[:-1], rtol=1e-8, atol=1e-12)
    error = test_places.numpy() - np.hstack([test_x.numpy(), ones]) @ solution
    spread = test_places.numpy() - places.numpy().mean(axis=0)
    want = 1 - (error**2).sum() / (spread**2).sum()
    assert r_squared(x, places, test_x, test_places) == pytest.approx(want, rel=1e-9)
    assert 0.3 < want < 0.95


def test_the_directions_of_the_places_are_found_and_taken_out():
    x, places = synthetic()
    v = torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    truth = torch.linalg.qr(v).Q
    q = position_directions(x, places, 1)
    cosines = torch.linalg.svdvals(q.T @ truth)  # of the angles between the two planes
    assert cosines.min() > 0.99
    torch.testing.assert_close(q.T @ q, torch.eye(2).double())
    left = remove(x, q)
    torch.testing.assert_close(left @ q, torch.zeros(len(x), 2).double())
    torch.testing.assert_close(remove(left, q), left)


def test_each_round_leaves_less_until_nothing_is_left():
    x, places = synthetic()
    scale = torch.linspace(0.5, 2, WIDTH).double()  # noise that differs with the direction hides some of it
    x, (other, other_places) = x * scale, synthetic(1)
    other = other * scale
    scores = []
    for rounds in range(5):
        q = position_directions(x, places, rounds)
        assert q.shape == (WIDTH, 2 * rounds)
        torch.testing.assert_close(q.T @ q, torch.eye(2 * rounds).double())
        scores.append(r_squared(remove(x, q), places, remove(other, q), other_places))
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.3
    assert scores[4] < 0.01
    assert position_directions(x[:, :3], places, 9).shape == (3, 2)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return build(ViT(size=64, width=24, depth=2, heads=2, patch=8, positions="sincos")).eval()


def test_a_network_with_strong_positions_knows_them_and_loses_them(backbone):
    images = {"name": "scenes", "count": 40, "test_count": 20}
    cfg = Config(
        train={**images, "split": "train"}, test={**images, "split": "test"}, size=64, resize=64, workers=0,
        precision="fp32", rounds=4,
    )  # fmt: skip
    scores = evaluate(cfg, backbone)
    assert (scores["images_train"], scores["images_test"]) == (40, 20)
    assert scores["r2"] > 0.8
    assert scores["r2_debiased"] < scores["r2"] - 0.3
    assert 0 < scores["variance_removed"] < 1
    assert scores == evaluate(cfg, backbone)


def test_what_has_no_grid_is_refused():
    images = {"name": "scenes", "count": 4, "test_count": 4, "split": "test"}
    with pytest.raises(ValueError, match=r"maps need one for each patch"):
        evaluate(
            Config(train=images, test=images, size=32, resize=32, workers=0), pixels.build(pixels.Config())
        )
    with pytest.raises(ValueError, match=r"rounds=0"):
        Config(rounds=0)
