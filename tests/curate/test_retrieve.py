"""Retrieval by seeds against loops, on cases small enough to see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinokit.curate.index import Vectors
from dinokit.curate.retrieve import retrieve_by_cluster, retrieve_by_sample, similarity_floor
from dinokit.curate.settings import Seeds

NO_CLUSTERS = np.full(6, -1)


def plain_loop(similarity, rows, k, n):
    """Round by round, asking seed by asking seed, in plain Python."""
    owner, got = {}, [0] * len(rows)
    for place in range(len(rows[0])):
        asks = [q for q in range(len(rows)) if got[q] < k and rows[q][place] >= 0]
        free = [q for q in asks if rows[q][place] not in owner]
        for q in sorted(free, key=lambda q: (-similarity[q][place], q)):
            if rows[q][place] not in owner:
                owner[rows[q][place]] = (q, place + 1)
                got[q] += 1
    return owner


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=100)
def test_images_go_to_seeds_as_in_a_plain_loop(seeds, k, reserve, seed):
    rng, n = np.random.default_rng(seed), 20
    truth = rng.random((seeds, n)).round(1).astype(np.float32)  # ties
    rows = np.argsort(-truth, axis=1, kind="stable")[:, : k * reserve]
    similarity = np.take_along_axis(truth, rows, 1)
    selection = retrieve_by_sample(similarity, rows, k, np.zeros(n, np.int64))
    expected = plain_loop(similarity.tolist(), rows.tolist(), k, n)
    assert {
        i: (q, r) for i, q, r in zip(selection["image"], selection["query"], selection["rank"], strict=True)
    } == expected
    assert (np.diff(selection["image"]) > 0).all()
    assert np.allclose(selection["similarity"], truth[selection["query"], selection["image"]])
    assert np.bincount(selection["query"]).max(initial=0) <= k


def test_with_a_reserve_equal_seeds_retrieve_different_images_and_without_they_share():
    similarity = np.array([[0.9, 0.8, 0.7, 0.6]] * 2, np.float32)
    rows = np.array([[3, 1, 4, 2]] * 2)
    assert retrieve_by_sample(similarity, rows, 2, NO_CLUSTERS)["image"].tolist() == [1, 2, 3, 4]
    assert retrieve_by_sample(similarity[:, :2], rows[:, :2], 2, NO_CLUSTERS)["image"].tolist() == [1, 3]


def test_the_floor_is_how_similar_the_seeds_are_to_each_other():
    rng = np.random.default_rng(0)
    seeds = rng.standard_normal((41, 5))
    seeds[7] = seeds[3]  # a copy: its nearest other seed is that, and not itself
    seeds /= np.linalg.norm(seeds, axis=1, keepdims=True)
    nearest = sorted(max(float(a @ b) for j, b in enumerate(seeds) if j != i) for i, a in enumerate(seeds))
    for strict, place in ((0, 0), (0.5, 20), (1, 40)):
        floor = similarity_floor(Vectors([seeds]), strict, False, rng)
        assert floor == pytest.approx(nearest[place], abs=1e-5)
    assert similarity_floor(Vectors([seeds[:1]]), 0.5, False, rng) == -1


def test_candidates_without_an_image_are_skipped():
    selection = retrieve_by_sample(
        np.array([[0.9, -np.inf]], np.float32), np.array([[0, -1]]), 2, NO_CLUSTERS
    )
    assert selection["image"].tolist() == [0]


def test_only_clusters_with_enough_seeds_give_images_and_no_more_than_the_cap():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8, dtype=np.float32)
    cluster = np.repeat([0, 1, 2], [50, 30, 20])
    hit = np.repeat([0, 1, 2], [4, 3, 9])  # more than 3: clusters 0 and 2
    around = lambda which: centres[which] + 0.05 * rng.standard_normal((len(which), 8)).astype(np.float32)  # noqa: E731
    images, seeds = Vectors([around(cluster)]), Vectors([around(hit)])
    cfg = Seeds(rule="cluster", min_hits=3, per_cluster=15, cap=1000)
    selection = retrieve_by_cluster(images, cluster, seeds, hit, cfg, False, np.random.default_rng(0))
    assert np.bincount(selection["cluster"]).tolist() == [15, 0, 15]
    assert (cluster[selection["image"]] == selection["cluster"]).all()
    assert (hit[selection["query"]] == selection["cluster"]).all()
    cosine = images.take(selection["image"]) @ seeds.take(np.arange(len(hit))).T
    cosine[selection["cluster"][:, None] != hit[None]] = -2
    assert np.allclose(selection["similarity"], cosine.max(axis=1), atol=1e-6)
    for number in (0, 2):
        own = selection["cluster"] == number
        assert sorted(selection["rank"][own]) == list(range(1, 16))
        assert (np.diff(selection["similarity"][own][np.argsort(selection["rank"][own])]) <= 0).all()
    capped = retrieve_by_cluster(
        images,
        cluster,
        seeds,
        hit,
        Seeds(rule="cluster", cap=21, per_cluster=15),
        False,
        np.random.default_rng(0),
    )
    assert sorted(np.bincount(capped["cluster"], minlength=3).tolist()) == [0, 10, 11]
    nothing = retrieve_by_cluster(images, cluster, seeds, hit, Seeds(rule="cluster", min_hits=9), False, rng)
    assert len(nothing["image"]) == 0
