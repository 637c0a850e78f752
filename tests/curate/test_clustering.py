"""k-means against a loop and scikit-learn; the hierarchy and the balanced sample by their purpose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SkKMeans

from dinokit.curate import clustering
from dinokit.curate.clustering import balanced_sample, entropy, even_quotas, sample_clusters
from dinokit.curate.index import Vectors
from dinokit.curate.settings import Balance, KMeans


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
def test_steps_equal_a_loop_over_clusters(blobs, steps, monkeypatch):
    start = blobs[:9].copy()
    monkeypatch.setattr(clustering, "_first_centres", lambda *_: start)
    monkeypatch.setattr(clustering, "chunk_size", lambda k: 128)
    cfg = KMeans(iterations=steps, points=0)
    ours = clustering.kmeans(Vectors([blobs], unit=False), 9, cfg, False, np.random.default_rng(0))
    assert np.allclose(ours, lloyd(blobs, start, steps), atol=1e-4)


def test_an_empty_cluster_keeps_its_centre(blobs, monkeypatch):
    far = np.full((1, 5), 1e4, np.float32)
    monkeypatch.setattr(clustering, "_first_centres", lambda *_: np.concatenate([blobs[:4], far]))
    ours = clustering.kmeans(
        Vectors([blobs], unit=False), 5, KMeans(points=0), False, np.random.default_rng(0)
    )
    assert np.array_equal(ours[4], far[0])


def test_clusters_are_as_tight_as_scikit_learns(blobs):
    vectors = Vectors([blobs], unit=False)
    centres = clustering.kmeans(vectors, 12, KMeans(), False, np.random.default_rng(0))
    _, distance = clustering.assign(vectors, centres, False)
    best = SkKMeans(12, n_init=10, random_state=0).fit(blobs).inertia_
    assert distance.sum(dtype=np.float64) < 1.05 * best


def test_first_centres_of_distant_blobs_are_one_in_each():
    rng = np.random.default_rng(1)
    blob = np.repeat(np.arange(20), 50)
    x = (100 * rng.standard_normal((20, 4))[blob] + rng.standard_normal((1000, 4))).astype(np.float32)
    chosen = clustering.plus_plus(x, 20, np.random.default_rng(0))
    where = [int(np.flatnonzero((x == row).all(axis=1))[0]) for row in chosen]
    assert sorted(blob[where].tolist()) == list(range(20))


def test_equal_points_leave_no_distance_to_draw_by():
    x = np.ones((6, 3), np.float32)
    assert clustering.plus_plus(x, 4, np.random.default_rng(0)).shape == (4, 3)


def test_more_clusters_than_images_are_refused(blobs):
    with pytest.raises(ValueError, match="901 clusters were asked for, but there are 900 images"):
        clustering.kmeans(Vectors([blobs]), 901, KMeans(), False, np.random.default_rng(0))


def test_resampled_levels_give_a_rare_kind_more_clusters_and_are_resumed(tmp_path):
    """Nine tenths of the points lie in a small square, the rest in one nine times as large beside it."""
    rng = np.random.default_rng(0)
    dense = rng.random((9000, 2))
    sparse = rng.random((1000, 2)) * 3 + [2, 0]
    vectors = Vectors([np.concatenate([dense, sparse]).astype(np.float32)], unit=False)
    shares = {}
    for steps in (0, 5):
        cfg = Balance(levels=(300, 40), resample=(0, steps), nearest=(5, 2), kmeans=KMeans(points=0))
        folder = tmp_path / str(steps)
        levels, distance = clustering.hierarchical_kmeans(vectors, cfg, False, 0, folder, lambda _: None)
        assert [len(level) for level in levels] == [10_000, 300]
        assert len(distance) == 10_000
        with np.load(folder / "level1.npz") as saved:
            shares[steps] = (saved["centres"][:, 0] > 1.5).mean()
        (folder / "level1.npz").unlink()
        again, _ = clustering.hierarchical_kmeans(vectors, cfg, False, 0, folder, lambda _: None)
        assert all(np.array_equal(a, b) for a, b in zip(levels, again, strict=True))
    assert shares[0] > 0.1  # by density alone
    assert shares[5] > shares[0]
    assert shares[5] > 0.6  # by area it would be 0.9


def one_at_a_time(sizes, total):
    """One image at a time, from a cluster that has given fewest and has more."""
    quotas = [0] * len(sizes)
    for _ in range(total):
        able = [i for i in range(len(sizes)) if quotas[i] < sizes[i]]
        quotas[min(able, key=lambda i: quotas[i])] += 1
    return sorted(quotas)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
@settings(max_examples=200)
def test_quotas_are_exact_possible_and_as_even_as_can_be(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    quotas = even_quotas(np.array(sizes), total, np.random.default_rng(0))
    assert quotas.sum() == total
    assert (quotas <= sizes).all()
    unfinished = quotas[quotas < sizes]
    assert not len(unfinished) or unfinished.max() - unfinished.min() <= 1
    assert not len(unfinished) or quotas.max() <= unfinished.min() + 1
    assert sorted(quotas.tolist()) == one_at_a_time(sizes, total)


def test_more_images_than_there_are_are_refused():
    with pytest.raises(ValueError, match="6 images were asked for, but there are 5"):
        even_quotas(np.array([2, 3]), 6, np.random.default_rng(0))


def test_a_sample_is_even_over_the_top_level_then_over_the_levels_below():
    leaf = np.repeat(np.arange(6), [50, 30, 20, 40, 40, 20])  # clusters of the finest level
    top = np.array([0, 0, 0, 1, 1, 1])
    image = balanced_sample([leaf, top], None, 80, np.random.default_rng(0))
    assert len(np.unique(image)) == 80
    counts = np.bincount(leaf[image], minlength=6)
    assert counts[:3].sum() == counts[3:].sum() == 40
    assert counts[:3].max() - counts[:3].min() <= 1
    assert counts[3:].max() - counts[3:].min() <= 1


@given(st.integers(0, 60), st.integers(0, 5))
@settings(max_examples=60)
def test_a_sample_has_the_requested_number_of_different_images(total, seed):
    rng = np.random.default_rng(seed)
    levels = [rng.integers(0, 9, 60), rng.integers(0, 4, 9), rng.integers(0, 2, 4)]
    image = balanced_sample(levels, None, total, np.random.default_rng(1))
    assert len(np.unique(image)) == len(image) == total
    top = levels[2][levels[1][levels[0]]]
    have, got = np.bincount(top, minlength=2), np.bincount(top[image], minlength=2)
    assert sorted(got.tolist()) == one_at_a_time(have.tolist(), total)


def test_central_images_are_those_nearest_to_their_centre():
    cluster = np.array([0, 0, 0, 1, 1])
    distance = np.array([0.3, 0.1, 0.2, 0.9, 0.8])
    assert sample_clusters(cluster, np.array([2, 1]), distance, np.random.default_rng(0)).tolist() == [
        1,
        2,
        4,
    ]


def test_entropy_is_one_for_equal_clusters_and_zero_for_one():
    assert entropy(np.array([5, 5, 5])) == pytest.approx(1)
    assert entropy(np.array([5, 0, 0])) == 0
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5 * np.log(2) / np.log(3))


def test_a_sample_is_drawn_where_the_last_cluster_is_empty():
    levels = [np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1])]  # three clusters, the last one empty
    assert list(balanced_sample(levels, None, 5, np.random.default_rng(0))) == [0, 1, 2, 3, 4]
