"""The keyed permutation, by exhaustion and by statistics; the generators, by comparing their numbers."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from dinokit.data.sampler import generator, hash_key, image_at, permute


@pytest.mark.parametrize("n", [*range(1, 40), 100, 127, 128, 129, 1000, 4096, 4097])
def test_every_index_goes_to_a_place_of_its_own(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_indices_of_a_very_large_set_stay_inside_it_and_apart() -> None:
    n = 3_000_000_019
    moved = [permute(i, n, 7) for i in range(n - 500, n)]
    assert len(set(moved)) == 500
    assert min(moved) >= 0
    assert max(moved) < n


def test_numpy_integers_do_as_well_as_python_ones() -> None:
    assert permute(np.int64(3), 10, np.int64(5)) == permute(3, 10, 5)
    assert image_at(0, np.int64(123), 50) == image_at(0, 123, 50)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=r"not in range\(10\)"):
        permute(index, 10, 0)


def test_all_orders_of_few_images_come_equally_often() -> None:
    """Fewer images make a harder test: the network has few cells to mix."""
    for n, orders in ((2, 2), (3, 6), (4, 24), (5, 120), (6, 720)):
        seen = Counter(tuple(permute(i, n, key) for i in range(n)) for key in range(orders * 20))
        assert len(seen) == orders
        assert stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize("n", [10, 97, 1000])
def test_an_index_goes_everywhere_equally_often(n: int) -> None:
    where = Counter(permute(n // 3, n, key) for key in range(20 * n))
    assert stats.chisquare([where[i] for i in range(n)]).pvalue > 1e-3


def test_neighbours_do_not_stay_together() -> None:
    n = 5000
    moved = np.array([permute(i, n, 11) for i in range(n)])
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.06  # 4 standard deviations
    assert abs(np.corrcoef(np.arange(n), moved)[0, 1]) < 0.06
    gaps = (moved[1:] - moved[:-1]) % n
    assert stats.chisquare(np.histogram(gaps, bins=50, range=(0, n))[0]).pvalue > 1e-3


def test_two_keys_agree_no_more_often_than_chance() -> None:
    n = 2000
    for one, other in ((0, 1), (1, 2), (5, 5 + 2**32)):
        same = sum(permute(i, n, one) == permute(i, n, other) for i in range(n))
        assert same < 8  # expected 1, as Poisson


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_each_image_comes_once_in_each_pass(n: int) -> None:
    for number in range(4):
        assert sorted(image_at(3, number * n + i, n) for i in range(n)) == list(range(n))


def test_passes_and_seeds_have_their_own_order() -> None:
    n = 1000
    orders = [
        [image_at(seed, number * n + i, n) for i in range(n)] for seed in (0, 1) for number in (0, 1, 2)
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_keys_of_different_numbers_differ() -> None:
    keys = {hash_key(a, b) for a in range(-30, 30) for b in range(60)}
    assert len(keys) == 3600
    assert len({hash_key(1), hash_key(1, 0), hash_key(0, 1), hash_key()}) == 4


def test_generators_repeat_themselves_and_never_each_other() -> None:
    places = [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (-1, 0, 0, 0),
        (0, 10**6, 10**5, 2),
    ]
    drawn = [generator(*at).random(100) for at in places]
    for at, numbers in zip(places, drawn, strict=True):
        np.testing.assert_array_equal(numbers, generator(*at).random(100))
    assert len(set(np.concatenate(drawn).tolist())) == 100 * len(places)


def test_first_numbers_of_neighbouring_places_are_uniform_and_unrelated() -> None:
    first = np.array([[generator(0, step, place, 0).random() for place in range(60)] for step in range(50)])
    assert stats.kstest(first.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]) < 0.08
    assert abs(np.corrcoef(first[:-1].ravel(), first[1:].ravel())[0, 1]) < 0.08
