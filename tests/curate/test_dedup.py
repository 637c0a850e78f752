"""Connected components against scipy's."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinokit.curate.dedup import Components, groups


def by_scipy(n, a, b):
    """The smallest point of each point's component."""
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    smallest = np.full(label.max() + 1, n)
    np.minimum.at(smallest, label, np.arange(n))
    return smallest[label]


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60),
    st.integers(1, 9),
)
@settings(max_examples=150)
def test_components_are_those_of_scipy_however_the_edges_are_batched(n, edges, batch):
    edges = np.array([(a % n, b % n) for a, b in edges], np.int64).reshape(-1, 2)
    ours = Components(n)
    for start in range(0, len(edges), batch):
        ours.add_edges(*edges[start : start + batch].T)
    assert ours.labels().tolist() == by_scipy(n, *edges.T).tolist()


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_a_chain_of_a_hundred_thousand_points_is_one_component(order):
    n = 100_000
    a = np.arange(n - 1)
    if order == "backwards":
        a = a[::-1]
    if order == "shuffled":
        a = np.random.default_rng(0).permutation(a)
    ours = Components(n)
    ours.add_edges(a, a + 1)
    assert (ours.labels() == 0).all()


def test_no_edges_leave_every_point_alone():
    ours = Components(3)
    ours.add_edges(np.empty(0, np.int64), np.empty(0, np.int64))
    assert ours.labels().tolist() == [0, 1, 2]


def test_groups_are_the_components_of_two_or_more():
    members, ends = groups(np.array([0, 1, 0, 3, 1, 1]))
    assert [members[a:b].tolist() for a, b in pairwise(ends)] == [[0, 2], [1, 4, 5]]
    members, ends = groups(np.array([0, 1]))
    assert (members.tolist(), ends.tolist()) == ([], [0])
