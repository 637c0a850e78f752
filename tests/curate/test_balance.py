"""Quotas are exact, possible and even; draws follow them down a tree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinokit.curate.balance import draw, entropy, quotas, take


def one_at_a_time(sizes, total):
    """What is left to give goes, one at a time, to a cluster that has given least and has more."""
    given_ = [0] * len(sizes)
    for _ in range(total):
        able = [i for i in range(len(sizes)) if given_[i] < sizes[i]]
        given_[min(able, key=lambda i: given_[i])] += 1
    return sorted(given_)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_quotas_are_exact_possible_and_as_even_as_can_be(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    given_ = quotas(np.array(sizes), total, np.random.default_rng(0))
    assert given_.sum() == total
    assert (given_ <= sizes).all()
    open_ = given_[given_ < sizes]
    assert not len(open_) or open_.max() - open_.min() <= 1
    assert not len(open_) or given_.max() <= open_.min() + 1
    assert sorted(given_.tolist()) == one_at_a_time(sizes, total)


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="6 images are wanted of 5"):
        quotas(np.array([2, 3]), 6, np.random.default_rng(0))


def test_a_draw_is_even_over_the_top_level_then_over_what_is_below():
    leaf = np.repeat(np.arange(6), [50, 30, 20, 40, 40, 20])  # clusters of the finest level
    top = np.array([0, 0, 0, 1, 1, 1])
    image = draw([leaf, top], None, 80, np.random.default_rng(0))
    assert len(np.unique(image)) == 80
    counts = np.bincount(leaf[image], minlength=6)
    assert counts[:3].sum() == counts[3:].sum() == 40
    assert counts[:3].max() - counts[:3].min() <= 1
    assert counts[3:].max() - counts[3:].min() <= 1


@given(st.integers(0, 60), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_draw_gives_just_so_many_different_images_from_any_tree(total, seed):
    rng = np.random.default_rng(seed)
    levels = [rng.integers(0, 9, 60), rng.integers(0, 4, 9), rng.integers(0, 2, 4)]
    image = draw(levels, None, total, np.random.default_rng(1))
    assert len(np.unique(image)) == len(image) == total
    top = levels[2][levels[1][levels[0]]]
    have, got = np.bincount(top, minlength=2), np.bincount(top[image], minlength=2)
    assert sorted(got.tolist()) == one_at_a_time(have.tolist(), total)


def test_central_images_are_those_nearest_to_their_centre():
    cluster = np.array([0, 0, 0, 1, 1])
    distance = np.array([0.3, 0.1, 0.2, 0.9, 0.8])
    assert take(cluster, np.array([2, 1]), distance, np.random.default_rng(0)).tolist() == [1, 2, 4]


def test_entropy_is_one_for_equal_clusters_and_zero_for_one():
    assert entropy(np.array([5, 5, 5])) == pytest.approx(1)
    assert entropy(np.array([5, 0, 0])) == 0
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5 * np.log(2) / np.log(3))
