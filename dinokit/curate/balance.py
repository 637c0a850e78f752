"""Quotas: how many images each of several clusters gives, as even as what they have allows.

Vo et al. 2024, arXiv 2405.15613, appendix; written from its description.
"""

from collections.abc import Sequence

import numpy as np


def quotas(sizes: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """How many each cluster gives.

    All give up to one common cap, the largest that does not exceed `total`; what is then missing comes one
    each from clusters, drawn by chance, that have more. So quotas of clusters that are not used up differ by
    one at most.

    Args:
        sizes: (c,) what there is.
        total: what is wanted together.
        rng: draws who gives the rest.

    Returns:
        (c,) int64, its sum is `total`, none above its size.

    Raises:
        ValueError: if there is less than `total`.
    """
    have = int(sizes.sum())
    if not 0 <= total <= have:
        raise ValueError(f"{total} images are wanted of {have}.")
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        cap = (low + high + 1) // 2
        if int(np.minimum(sizes, cap).sum()) <= total:
            low = cap
        else:
            high = cap - 1
    done = np.minimum(sizes, low).astype(np.int64)
    roomy = np.flatnonzero(sizes > low)
    done[rng.choice(roomy, total - int(done.sum()), replace=False)] += 1
    return done


def draw(
    levels: Sequence[np.ndarray], distance: np.ndarray | None, total: int, rng: np.random.Generator
) -> np.ndarray:
    """`total` images, spread evenly over the clusters of the top level, then over theirs, down to images.

    Args:
        levels: from the finest up: (n,) the cluster of each image, (c,) the cluster of each cluster, ...
        distance: (n,) of each image to its centre: the nearest are drawn; None: drawn by chance.
        total: how many.
        rng: of quotas and draws.

    Returns:
        (total,) int64 places of images, ascending.

    Raises:
        ValueError: if there are not so many.
    """
    sizes = [np.ones(len(levels[0]), np.int64)]  # images under each node, level by level
    for cluster in levels:
        sizes.append(np.bincount(cluster, sizes[-1], int(cluster.max(initial=0)) + 1).astype(np.int64))
    give = quotas(sizes[-1], total, rng)
    for cluster, size in zip(levels[:0:-1], sizes[-2:0:-1], strict=True):
        children, ends = by_cluster(cluster, len(give))
        below = np.zeros(len(size), np.int64)
        for parent in np.flatnonzero(give):
            own = children[ends[parent] : ends[parent + 1]]
            below[own] = quotas(size[own], int(give[parent]), rng)
        give = below
    return take(levels[0], give, distance, rng)


def take(
    cluster: np.ndarray, give: np.ndarray, distance: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """give[c] images of each cluster c, places ascending; see draw()."""
    key = rng.random(len(cluster)) if distance is None else distance
    order = np.lexsort((key, cluster))
    ends = np.searchsorted(cluster[order], np.arange(len(give)))
    rank = np.arange(len(order)) - ends[cluster[order]]
    return np.sort(order[rank < give[cluster[order]]])


def by_cluster(cluster: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Members sorted by cluster, and (count + 1,) where each cluster begins among them."""
    order = np.argsort(cluster, kind="stable")
    return order, np.searchsorted(cluster[order], np.arange(count + 1))


def entropy(counts: np.ndarray) -> float:
    """Of how images spread over clusters, from 0, all in one, to 1, evenly over all of them."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts))) if len(counts) > 1 else 1.0
