"""Clusters of clusters, flattened level by level, so that the top ones lie evenly over what the images show.

Vo et al. 2024, "Automatic data curation for self-supervised learning" (arXiv 2405.15613); written from its
description. k-means puts its centres where images are many. Learning them again from a few members of each
cluster, the same number whether it is large or small, evens that out; the next level starts from centres
that are spread more evenly already.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinokit.curate.balance import take
from dinokit.curate.kmeans import cluster, nearest
from dinokit.curate.settings import Balance
from dinokit.curate.stages import save
from dinokit.curate.vectors import Vectors


def grow(
    vectors: Vectors, cfg: Balance, gpu: bool, seed: int, folder: Path, told: Callable[[str], None]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The levels from the finest up, each left in `folder` and taken from there if it is there.

    Returns:
        One array a level: (n,) the cluster of each image, (c,) the cluster of each cluster below, ...; and
        (n,) the squared distance of each image to its centre.

    Raises:
        ValueError: if there are fewer images than clusters at the finest level.
    """
    levels: list[np.ndarray] = []
    first: np.ndarray | None = None
    points = vectors
    for number, k in enumerate(cfg.levels):
        saved = folder / f"level{number}.npz"
        if not saved.exists():
            told(f"level {number + 1}: {k} clusters of {len(points)}")
            rng = np.random.default_rng([seed, 7, number])
            centres, which, distance = level(points, k, number, cfg, gpu, rng)
            save(saved, centres=centres, cluster=which, distance=distance)
        with np.load(saved) as arrays:
            levels.append(arrays["cluster"])
            first = arrays["distance"] if first is None else first
            points = Vectors([arrays["centres"]], unit=False)
    assert first is not None
    return levels, first


def level(
    points: Vectors, k: int, number: int, cfg: Balance, gpu: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One level: centres (k, D), and of each point its cluster and the squared distance to its centre."""
    centres = cluster(points, k, cfg.kmeans, gpu, rng)
    which, distance = nearest(points, centres, gpu)
    for _ in range(cfg.resample[number]):
        central = take(which, np.full(k, cfg.nearest[number]), distance, rng)
        if len(central) < k:
            break  # so few members that there is nothing left to even out
        centres = cluster(points.at(central), k, cfg.kmeans, gpu, rng)
        which, distance = nearest(points, centres, gpu)
    return centres, which, distance
