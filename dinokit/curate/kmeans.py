"""k-means over vectors on disk: k-means++ centres, then Lloyd's steps with sums in float64.

Arthur and Vassilvitskii 2007 (greedy k-means++, 2 + ln k trials); what a step needs is read in pieces.
"""

import math

import numpy as np
import torch

from dinokit.curate.index import assign
from dinokit.curate.settings import KMeans
from dinokit.curate.vectors import Vectors

_BLOCK = 1 << 26  # distances held at a time: rows of a piece times centres
_FIRST = 20  # rows a centre that k-means++ chooses among


def cluster(vectors: Vectors, k: int, cfg: KMeans, gpu: bool, rng: np.random.Generator) -> np.ndarray:
    """Centres (k, D) float32 that are near to the vectors, by squared distance.

    An empty cluster keeps its centre. With as many clusters as vectors, the vectors are the centres.

    Raises:
        ValueError: if there are fewer vectors than clusters.
    """
    n = len(vectors)
    if k > n:
        raise ValueError(f"{k} clusters were asked for, but there are {n} images: ask for fewer.")
    if cfg.points and n > k * cfg.points:
        vectors = vectors.at(np.sort(rng.choice(n, k * cfg.points, replace=False)))
    centres = _first(vectors, k, cfg, rng)
    for _ in range(cfg.iterations):
        sums = torch.zeros(centres.shape, dtype=torch.float64)
        counts = np.zeros(k, np.int64)
        for _, x in vectors.chunks(piece(k)):
            which, _ = assign(x, centres, gpu)
            sums.index_add_(0, torch.from_numpy(which), torch.from_numpy(x).double())
            counts += np.bincount(which, minlength=k)
        moved = np.where(counts[:, None] > 0, sums.numpy() / np.maximum(counts, 1)[:, None], centres)
        still = np.array_equal(moved.astype(np.float32), centres)
        centres = moved.astype(np.float32)
        if still:
            break
    return centres


def nearest(vectors: Vectors, centres: np.ndarray, gpu: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each vector its cluster (n,) int64, and the squared distance to its centre (n,) float32."""
    which, distance = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for start, x in vectors.chunks(piece(len(centres))):
        here = slice(start, start + len(x))
        which[here], distance[here] = assign(x, centres, gpu)
    return which, distance


def piece(k: int) -> int:
    """Rows to read at a time against k centres."""
    return min(max(_BLOCK // k, 1024), 65_536)


def _first(vectors: Vectors, k: int, cfg: KMeans, rng: np.random.Generator) -> np.ndarray:
    n = len(vectors)
    if k > cfg.plus_plus:
        return vectors.take(np.sort(rng.choice(n, k, replace=False)))
    some = np.sort(rng.choice(n, min(n, _FIRST * k), replace=False))
    return plus_plus(vectors.take(some), k, rng)


def plus_plus(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """K rows of x (m, D), far from each other.

    Each next one is drawn by its squared distance to the nearest of those before, a few times, and the draw
    that leaves the smallest sum of these distances is kept.
    """
    trials = 2 + int(math.log(k))
    length = np.einsum("ij,ij->i", x, x)
    chosen = [int(rng.integers(len(x)))]
    left = _squared(x, length, np.array(chosen))[0]
    for _ in range(k - 1):
        total = np.cumsum(left, dtype=np.float64)
        if total[-1] <= 0:  # all that is left lies on a centre
            chosen.append(int(rng.integers(len(x))))
            continue
        draws = np.searchsorted(total, rng.random(trials) * total[-1], side="right")
        draws = np.minimum(draws, len(x) - 1)
        after = np.minimum(_squared(x, length, draws), left)
        best = int(after.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(draws[best]))
        left = after[best]
    return x[chosen]


def _squared(x: np.ndarray, length: np.ndarray, to: np.ndarray) -> np.ndarray:
    """(len(to), m) squared distances of all rows to those rows."""
    return np.maximum(length + length[to, None] - 2 * x[to] @ x.T, 0)
