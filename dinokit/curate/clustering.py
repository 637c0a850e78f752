"""k-means over vectors on disk, hierarchical k-means, and sampling that is even over its clusters.

Arthur and Vassilvitskii 2007 (greedy k-means++, 2 + ln k trials); Vo et al. 2024, "Automatic data curation
for self-supervised learning" (arXiv 2405.15613), written from its description.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dinokit.curate.index import Vectors, nearest_centre, save
from dinokit.curate.settings import Balance, KMeans

_BLOCK = 1 << 26  # distances in memory at a time: rows of a chunk times centres
_FIRST = 20  # rows a centre that k-means++ chooses among


def kmeans(vectors: Vectors, k: int, cfg: KMeans, gpu: bool, rng: np.random.Generator) -> np.ndarray:
    """Learn centres (k, D) float32 by Lloyd's algorithm, with sums in float64.

    An empty cluster keeps its centre.

    Raises:
        ValueError: if there are fewer vectors than clusters.
    """
    n = len(vectors)
    if k > n:
        raise ValueError(f"{k} clusters were asked for, but there are {n} images: ask for fewer.")
    if cfg.points and n > k * cfg.points:
        vectors = vectors.select(np.sort(rng.choice(n, k * cfg.points, replace=False)))
    centres = _first_centres(vectors, k, cfg, rng)
    for _ in range(cfg.iterations):
        sums = torch.zeros(centres.shape, dtype=torch.float64)
        counts = np.zeros(k, np.int64)
        for _, x in vectors.chunks(chunk_size(k)):
            cluster, _ = nearest_centre(x, centres, gpu)
            sums.index_add_(0, torch.from_numpy(cluster), torch.from_numpy(x).double())
            counts += np.bincount(cluster, minlength=k)
        means = np.where(counts[:, None] > 0, sums.numpy() / np.maximum(counts, 1)[:, None], centres)
        converged = np.array_equal(means.astype(np.float32), centres)
        centres = means.astype(np.float32)
        if converged:
            break
    return centres


def assign(vectors: Vectors, centres: np.ndarray, gpu: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each vector its cluster (n,) int64, and the squared distance to its centre (n,) float32."""
    cluster, distance = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for start, x in vectors.chunks(chunk_size(len(centres))):
        here = slice(start, start + len(x))
        cluster[here], distance[here] = nearest_centre(x, centres, gpu)
    return cluster, distance


def chunk_size(k: int) -> int:
    """Rows to compare with k centres at a time."""
    return min(max(_BLOCK // k, 1024), 65_536)


def _first_centres(vectors: Vectors, k: int, cfg: KMeans, rng: np.random.Generator) -> np.ndarray:
    n = len(vectors)
    if k > cfg.plus_plus:
        return vectors.take(np.sort(rng.choice(n, k, replace=False)))
    sample = np.sort(rng.choice(n, min(n, _FIRST * k), replace=False))
    return plus_plus(vectors.take(sample), k, rng)


def plus_plus(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Choose k rows of x (m, D) that are far from each other, by greedy k-means++.

    Each next row is drawn with a probability proportional to its squared distance to the nearest row chosen
    so far. Of several draws, the one that leaves the smallest sum of these distances is chosen.
    """
    trials = 2 + int(math.log(k))
    length = np.einsum("ij,ij->i", x, x)
    chosen = [int(rng.integers(len(x)))]
    distance = _squared_distances(x, length, np.array(chosen))[0]
    for _ in range(k - 1):
        total = np.cumsum(distance, dtype=np.float64)
        if total[-1] <= 0:  # every row lies on a chosen one
            chosen.append(int(rng.integers(len(x))))
            continue
        draws = np.searchsorted(total, rng.random(trials) * total[-1], side="right")
        draws = np.minimum(draws, len(x) - 1)
        after = np.minimum(_squared_distances(x, length, draws), distance)
        best = int(after.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(draws[best]))
        distance = after[best]
    return x[chosen]


def _squared_distances(x: np.ndarray, length: np.ndarray, to: np.ndarray) -> np.ndarray:
    """(len(to), m) squared distances of all rows to the rows `to`; length (m,) squared."""
    return np.maximum(length + length[to, None] - 2 * x[to] @ x.T, 0)


def hierarchical_kmeans(
    vectors: Vectors, cfg: Balance, gpu: bool, seed: int, folder: Path, log: Callable[[str], None]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cluster the vectors, then the centres, and so on; each level is saved in `folder`.

    k-means puts most centres where images are dense. Each level is therefore learnt again from an equal
    number of members of every cluster (resampling), which spreads its centres more evenly over what the
    images show; the next level starts from these.

    Returns:
        One array a level, from the finest up: (n,) the cluster of each image, (c,) the cluster of each
        cluster below, ...; and (n,) the squared distance of each image to its centre.

    Raises:
        ValueError: if there are fewer images than clusters at the finest level.
    """
    levels: list[np.ndarray] = []
    first_distance: np.ndarray | None = None
    points = vectors
    for number, k in enumerate(cfg.levels_of(len(vectors))):
        file = folder / f"level{number}.npz"
        if not file.exists():
            log(f"level {number + 1}: {k} clusters of {len(points)}")
            rng = np.random.default_rng([seed, 7, number])
            centres, cluster, distance = _level(points, k, number, cfg, gpu, rng)
            save(file, centres=centres, cluster=cluster, distance=distance)
        with np.load(file) as arrays:
            levels.append(arrays["cluster"])
            first_distance = arrays["distance"] if first_distance is None else first_distance
            points = Vectors([arrays["centres"]], unit=False)
    assert first_distance is not None
    return levels, first_distance


def _level(
    points: Vectors, k: int, number: int, cfg: Balance, gpu: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One level: centres (k, D), and of each point its cluster and the squared distance to its centre."""
    centres = kmeans(points, k, cfg.kmeans, gpu, rng)
    cluster, distance = assign(points, centres, gpu)
    for _ in range(cfg.resample[number]):
        central = sample_clusters(cluster, np.full(k, cfg.nearest[number]), distance, rng)
        if len(central) < k:
            break  # too few points to learn k centres from
        centres = kmeans(points.select(central), k, cfg.kmeans, gpu, rng)
        cluster, distance = assign(points, centres, gpu)
    return centres, cluster, distance


def even_quotas(sizes: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """How many images each cluster gives, as even as the sizes allow.

    All clusters give up to one common cap, the largest that does not exceed `total`; the rest comes from
    random clusters that have more, one image each. So quotas of clusters that still have images differ by one
    at most.

    Args:
        sizes: (c,) images of each cluster.
        total: images to give.
        rng: draws the clusters that give the rest.

    Returns:
        (c,) int64 with the sum `total`, none above its size.

    Raises:
        ValueError: if there are fewer images than `total`.
    """
    available = int(sizes.sum())
    if not 0 <= total <= available:
        raise ValueError(f"{total} images were asked for, but there are {available}.")
    caps = range(int(sizes.max(initial=0)) + 1)
    cap = bisect_right(caps, total, key=lambda cap: int(np.minimum(sizes, cap).sum())) - 1
    quotas = np.minimum(sizes, cap).astype(np.int64)
    larger = np.flatnonzero(sizes > cap)
    quotas[rng.choice(larger, total - int(quotas.sum()), replace=False)] += 1
    return quotas


def balanced_sample(
    levels: Sequence[np.ndarray], distance: np.ndarray | None, total: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw images evenly over the clusters of the top level, then over the clusters in these, and so on.

    Args:
        levels: from the finest up: (n,) the cluster of each image, (c,) the cluster of each cluster, ...
        distance: (n,) of each image to its centre: the nearest are drawn; None: drawn at random.
        total: images to draw.
        rng: of quotas and draws.

    Returns:
        (total,) int64 numbers of images, ascending.

    Raises:
        ValueError: if there are fewer images than `total`.
    """
    sizes = [np.ones(len(levels[0]), np.int64)]  # images under each node, level by level
    counts = [*map(len, levels[1:]), int(levels[-1].max(initial=0)) + 1]  # the last ones may be empty
    for cluster, count in zip(levels, counts, strict=True):
        sizes.append(np.bincount(cluster, sizes[-1], count).astype(np.int64))
    quotas = even_quotas(sizes[-1], total, rng)
    for cluster, size in zip(levels[:0:-1], sizes[-2:0:-1], strict=True):
        members, starts = sort_by_cluster(cluster, len(quotas))
        below = np.zeros(len(size), np.int64)
        for parent in np.flatnonzero(quotas):
            children = members[starts[parent] : starts[parent + 1]]
            below[children] = even_quotas(size[children], int(quotas[parent]), rng)
        quotas = below
    return sample_clusters(levels[0], quotas, distance, rng)


def sample_clusters(
    cluster: np.ndarray, quotas: np.ndarray, distance: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Draw quotas[c] images of each cluster c, numbers ascending; `distance` as in balanced_sample()."""
    key = rng.random(len(cluster)) if distance is None else distance
    order = np.lexsort((key, cluster))
    starts = np.searchsorted(cluster[order], np.arange(len(quotas)))
    rank = np.arange(len(order)) - starts[cluster[order]]
    return np.sort(order[rank < quotas[cluster[order]]])


def sort_by_cluster(cluster: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Members sorted by cluster, and (count + 1,) where each of `count` clusters starts among them."""
    order = np.argsort(cluster, kind="stable")
    return order, np.searchsorted(cluster[order], np.arange(count + 1))


def entropy(counts: np.ndarray) -> float:
    """Entropy of the sizes of clusters, from 0 (all images in one) to 1 (all clusters of the same size)."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts))) if len(counts) > 1 else 1.0
