"""k-means against a loop over Lloyd's steps and against scikit-learn; the hierarchy by what it is for."""

import numpy as np
import pytest
from sklearn.cluster import KMeans as SkKMeans

from dinokit.curate import hierarchy, kmeans
from dinokit.curate.settings import Balance, KMeans
from dinokit.curate.vectors import Vectors


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, 5)) * 3
    return (centres[rng.integers(0, 12, 900)] + 0.5 * rng.standard_normal((900, 5))).astype(np.float32)


def lloyd(x, centres, steps):
    """One cluster at a time, in float64."""
    for _ in range(steps):
        near = ((x[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        centres = np.array([x[near == c].mean(axis=0, dtype=np.float64) if (near == c).any() else centres[c]
                            for c in range(len(centres))]).astype(np.float32)  # fmt: skip
    return centres


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_steps_are_lloyds(blobs, steps, monkeypatch):
    start = blobs[:9].copy()
    monkeypatch.setattr(kmeans, "_first", lambda *_: start)
    monkeypatch.setattr(kmeans, "piece", lambda k: 128)
    cfg = KMeans(iterations=steps, points=0)
    ours = kmeans.cluster(Vectors([blobs], unit=False), 9, cfg, False, np.random.default_rng(0))
    assert np.allclose(ours, lloyd(blobs, start, steps), atol=1e-4)


def test_an_empty_cluster_keeps_its_centre(blobs, monkeypatch):
    far = np.full((1, 5), 1e4, np.float32)
    monkeypatch.setattr(kmeans, "_first", lambda *_: np.concatenate([blobs[:4], far]))
    ours = kmeans.cluster(Vectors([blobs], unit=False), 5, KMeans(points=0), False, np.random.default_rng(0))
    assert np.array_equal(ours[4], far[0])


def test_clusters_are_as_tight_as_scikit_learns(blobs):
    vectors = Vectors([blobs], unit=False)
    centres = kmeans.cluster(vectors, 12, KMeans(), False, np.random.default_rng(0))
    _, distance = kmeans.nearest(vectors, centres, False)
    best = SkKMeans(12, n_init=10, random_state=0).fit(blobs).inertia_
    assert distance.sum(dtype=np.float64) < 1.05 * best


def test_first_centres_of_well_parted_blobs_are_one_in_each():
    rng = np.random.default_rng(1)
    blob = np.repeat(np.arange(20), 50)
    x = (100 * rng.standard_normal((20, 4))[blob] + rng.standard_normal((1000, 4))).astype(np.float32)
    chosen = kmeans.plus_plus(x, 20, np.random.default_rng(0))
    where = [int(np.flatnonzero((x == row).all(axis=1))[0]) for row in chosen]
    assert sorted(blob[where].tolist()) == list(range(20))


def test_copies_only_leave_no_distance_to_draw_by():
    x = np.ones((6, 3), np.float32)
    assert kmeans.plus_plus(x, 4, np.random.default_rng(0)).shape == (4, 3)


def test_more_clusters_than_images_are_refused(blobs):
    with pytest.raises(ValueError, match="901 clusters were asked for, but there are 900 images"):
        kmeans.cluster(Vectors([blobs]), 901, KMeans(), False, np.random.default_rng(0))


def test_flattened_levels_give_a_rare_kind_more_clusters_and_are_resumed(tmp_path):
    """Nine tenths of the points lie in a small square, the rest in one nine times as large beside it."""
    rng = np.random.default_rng(0)
    dense = rng.random((9000, 2))
    sparse = rng.random((1000, 2)) * 3 + [2, 0]
    vectors = Vectors([np.concatenate([dense, sparse]).astype(np.float32)], unit=False)
    shares = {}
    for steps in (0, 5):
        cfg = Balance(levels=(300, 40), resample=(0, steps), nearest=(5, 2), kmeans=KMeans(points=0))
        folder = tmp_path / str(steps)
        levels, distance = hierarchy.grow(vectors, cfg, False, 0, folder, lambda _: None)
        assert [len(level) for level in levels] == [10_000, 300]
        assert len(distance) == 10_000
        with np.load(folder / "level1.npz") as saved:
            shares[steps] = (saved["centres"][:, 0] > 1.5).mean()
        (folder / "level1.npz").unlink()
        again, _ = hierarchy.grow(vectors, cfg, False, 0, folder, lambda _: None)
        assert all(np.array_equal(a, b) for a, b in zip(levels, again, strict=True))
    assert shares[0] > 0.1  # by density alone
    assert shares[5] > shares[0]
    assert shares[5] > 0.6  # by area it would be 0.9
