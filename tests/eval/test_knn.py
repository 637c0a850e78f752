"""Weighted k-NN against its definition in Python floats, and against scikit-learn; then whole evaluations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinokit.eval.knn import accuracies, draw_shots, nearest, vote
from dinokit.features import Features


def points(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def labels_of(n, classes, seed=1):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def vote_by_hand(query, bank, labels, k, temp, classes):
    """Wu et al. 2018, section 3.4, for one query, with the weights made to sum to 1."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    near = sorted(((-cosine(query, row), i) for i, row in enumerate(bank)))[:k]
    weights = [math.exp(-minus / temp) for minus, _ in near]
    votes = [0.0] * classes
    for weight, (_, i) in zip(weights, near, strict=True):
        votes[labels[i]] += weight / sum(weights)
    return votes


@pytest.mark.parametrize(("n", "k"), [(40, 1), (40, 7), (40, 40), (3, 20)])
def test_a_vote_is_the_definition(n, k):
    query, bank, labels = points(9, 5), points(n, 5, seed=2), labels_of(n, 4)
    votes = vote(query, bank, labels, k, 0.07, 4)
    for row, x in zip(votes.tolist(), query.tolist(), strict=True):
        assert row == pytest.approx(vote_by_hand(x, bank.tolist(), labels.tolist(), k, 0.07, 4), abs=1e-5)


@pytest.mark.parametrize("k", [1, 10, 50])
def test_the_class_is_the_one_that_scikit_learn_predicts(k):
    query, bank, labels = points(300, 8), points(500, 8, seed=2), labels_of(500, 7)
    other = KNeighborsClassifier(
        k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
    )
    other.fit(bank.double().numpy(), labels.numpy())
    ours = vote(query.double(), bank.double(), labels, k, 0.07, 7).argmax(dim=1)
    assert ours.tolist() == other.predict(query.double().numpy()).tolist()


def test_the_length_of_a_feature_has_no_say():
    query, bank, labels = points(9, 5), points(40, 5, seed=2), labels_of(40, 4)
    scale = torch.rand(40, 1, generator=torch.Generator().manual_seed(4)) + 0.1
    torch.testing.assert_close(
        vote(3 * query, scale * bank, labels, 7, 0.1, 4), vote(query, bank, labels, 7, 0.1, 4)
    )


def test_more_neighbours_than_there_are_means_all():
    query, bank, labels = points(9, 5), points(40, 5, seed=2), labels_of(40, 4)
    assert torch.equal(vote(query, bank, labels, 400, 0.1, 4), vote(query, bank, labels, 40, 0.1, 4))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 7), (100, 13), (5, 1000)])
def test_the_size_of_a_block_changes_nothing(rows, columns):
    query, bank = F.normalize(points(23, 6), dim=1), F.normalize(points(101, 6, seed=2), dim=1)
    cosines, places = nearest(query, bank, 17)
    other_cosines, other_places = nearest(query, bank, 17, rows, columns)
    torch.testing.assert_close(other_cosines, cosines, atol=1e-6, rtol=0)
    assert torch.equal(other_places, places)


@pytest.mark.parametrize("columns", [1, 3, 4, 8, 100])
def test_of_equally_near_images_the_first_are_taken_in_order(columns):
    # Unit vectors along the axes, 4 and 8 and 4 of each, have a middle and distances without rounding.
    axes = torch.eye(3)
    bank = axes[torch.tensor([1, 0, 2, 1, 0, 1, 1, 0, 2, 1, 1, 2, 1, 0, 1, 2])]
    _, places = nearest(axes, bank, 6, columns=columns)
    assert places.tolist() == [[1, 4, 7, 13, 0, 2], [0, 3, 5, 6, 9, 10], [2, 8, 11, 15, 0, 1]]


def test_features_that_differ_by_a_hundred_thousandth_are_still_distinguished():
    # In float32 all of these cosines are 1, or one step beside it.
    query, bank = (torch.ones(16) + 1e-5 * points(n, 16, seed=n) for n in (8, 60))
    labels = labels_of(60, 5)
    near = F.normalize(query, dim=1) @ F.normalize(bank, dim=1).T
    assert near.unique().numel() < 9
    for row, x in zip(vote(query, bank, labels, 5, 0.07, 5).tolist(), query.tolist(), strict=True):
        assert row == pytest.approx(vote_by_hand(x, bank.tolist(), labels.tolist(), 5, 0.07, 5), abs=1e-5)


def test_the_search_holds_one_block_of_cosines_at_a_time():
    query, bank = F.normalize(points(1000, 2), dim=1), F.normalize(points(600, 2, seed=2), dim=1)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))
            return result

    with Watch():
        nearest(query, bank, 5, rows=100, columns=100)
    assert max(sizes) == 100 * (5 + 100)  # the block and the best so far; all cosines would be 600,000


def test_top_1_and_top_5_are_counted_from_the_votes():
    train = Features(F.normalize(points(200, 4), dim=1), labels_of(200, 9), [])
    test = Features(F.normalize(points(70, 4, seed=5), dim=1), labels_of(70, 9, seed=6), [])
    scores = accuracies(train, test, [3, 30], 0.07, 9)
    for k in (3, 30):
        votes = vote(test.x, train.x, train.y, k, 0.07, 9).tolist()
        ranked = [
            sorted((c for c in range(9) if row[c] > 0), key=lambda c, row=row: -row[c]) for row in votes
        ]
        for top in (1, 5):
            share = np.mean([y in row[:top] for row, y in zip(ranked, test.y.tolist(), strict=True)])
            assert scores[f"top{top}@{k}"] == pytest.approx(share, abs=1e-12)


def test_a_class_without_a_vote_is_never_among_the_five():
    train = Features(torch.eye(6), torch.arange(6), [])
    test = Features(torch.eye(6).roll(1, 0), torch.arange(6), [])
    assert accuracies(train, test, [1], 0.07, 6) == {"top1@1": 0.0, "top5@1": 0.0}


def test_of_equal_votes_the_smaller_class_wins():
    train = Features(torch.eye(2), torch.tensor([1, 0]), [])
    test = Features(F.normalize(torch.ones(2, 2), dim=1), torch.tensor([0, 1]), [])
    assert accuracies(train, test, [2], 0.07, 2) == {"top1@2": 0.5}


def test_shots_are_so_many_different_images_of_each_class_and_another_draw_for_another_seed():
    train = Features(torch.arange(60.0)[:, None], torch.arange(60) % 3, [])
    draws = [draw_shots(train, 5, seed, ["a", "b", "c"]) for seed in (0, 1, 0)]
    for draw in draws:
        assert np.bincount(draw.y.numpy()).tolist() == [5, 5, 5]
        assert len(set(draw.x.flatten().tolist())) == 15
        assert (draw.x.flatten().long() % 3).tolist() == draw.y.tolist()
    assert torch.equal(draws[0].x, draws[2].x)
    assert not torch.equal(draws[0].x, draws[1].x)
