"""What the seeds bring: the two retrievals of DINOv2 (arXiv 2304.07193, section 3 and appendix A.4).

Both give Picks: which images of the pool, and for each why.
"""

from dataclasses import dataclass

import numpy as np

from dinokit.curate.balance import by_cluster, quotas, take
from dinokit.curate.index import exact
from dinokit.curate.seeds import Config as Seeds
from dinokit.curate.vectors import CHUNK, Vectors

ASKED = 1000  # seeds that the floor is learnt from


@dataclass
class Picks:
    """Images with their provenance, one entry each, all (m,)."""

    image: np.ndarray  # int64 place among the images searched, ascending, each once
    query: np.ndarray  # int64 seed that brought it
    rank: np.ndarray  # int64 from 1: its place among what the seed was shown, or among the seed's cluster's
    similarity: np.ndarray  # float32, to the seed
    cluster: np.ndarray  # int64 that it came from; -1 for rule=sample


def award(similarity: np.ndarray, rows: np.ndarray, k: int, n: int) -> Picks:
    """The k nearest images of each seed (rule=sample).

    Seeds are shown more than k images, so that an image goes to one seed alone and the others take their
    next: k new images a seed, as the published numbers have it (4 * 14,197,086 = 56,788,344). Shown k, seeds
    share, and an image that several bring goes to the most similar.

    In every round each seed that wants more asks for its nearest image not yet asked for. A free image goes
    to the most similar of those who ask, of equals to the first.

    Args:
        similarity: (q, w), falling.
        rows: (q, w) images, -1 for none.
        k: how many a seed gets.
        n: how many images there are.
    """
    free = np.ones(n, np.bool_)
    got = np.zeros(len(rows), np.int64)
    won: list[np.ndarray] = []
    for place in range(rows.shape[1]):
        asks = np.flatnonzero((got < k) & (rows[:, place] >= 0))
        asks = asks[free[rows[asks, place]]]
        asks = asks[np.lexsort((asks, -similarity[asks, place]))]  # the most similar first
        image, first = np.unique(rows[asks, place], return_index=True)
        query = asks[first]
        got[query] += 1
        free[image] = False
        won.append(np.stack([image, query, np.full(len(image), place)]))
    image, query, place = np.concatenate(won, axis=1)
    order = np.argsort(image)
    image, query, place = image[order], query[order], place[order]
    none = np.full(len(image), -1)
    return Picks(image, query, place + 1, similarity[query, place], none)


def floor_of(seeds: Vectors, strict: float, gpu: bool, rng: np.random.Generator) -> float:
    """How like its seed an image must be. Seeds are of what is sought: they show how alike that is.

    Args:
        seeds: one alone gives no floor.
        strict: the floor is what this share of them has as its similarity to the nearest other one, at most.
        gpu: whether to use the GPUs that faiss sees.
        rng: draws the thousand that are asked.
    """
    asked = np.sort(rng.choice(len(seeds), min(len(seeds), ASKED), replace=False))
    similarity, rows = exact(seeds.take(asked), seeds, 2, gpu)
    other = np.where(rows[:, 0] == asked, similarity[:, 1], similarity[:, 0])  # a copy may come first
    return float(np.quantile(other, strict)) if len(seeds) > 1 else -1.0


def by_cluster_hits(
    vectors: Vectors,
    cluster: np.ndarray,
    seeds: Vectors,
    hit: np.ndarray,
    cfg: Seeds,
    gpu: bool,
    rng: np.random.Generator,
) -> Picks:
    """Images drawn from the clusters that seeds hit (rule=cluster).

    Args:
        vectors: the images searched.
        cluster: (n,) of each.
        seeds: the seeds.
        hit: (q,) the cluster of each seed.
        cfg: a cluster with more than `min_hits` seeds gives up to `per_cluster` images, all clusters together
            `cap`, as evenly as they can; which ones is chance.
        gpu: whether to use the GPUs that faiss sees.
        rng: draws them.
    """
    count = int(max(cluster.max(initial=-1), hit.max(initial=-1))) + 1
    sizes = np.bincount(cluster, minlength=count)
    liked = np.bincount(hit, minlength=count) > cfg.min_hits
    most = np.where(liked, np.minimum(sizes, cfg.per_cluster), 0)
    image = take(cluster, quotas(most, min(cfg.cap, int(most.sum())), rng), None, rng)
    picks = Picks(
        image,
        np.full(len(image), -1),
        np.zeros(len(image), np.int64),
        np.zeros(len(image), np.float32),
        cluster[image],
    )
    members, ends = by_cluster(picks.cluster, count)
    own, own_ends = by_cluster(hit, count)
    for number in np.unique(picks.cluster):
        here = members[ends[number] : ends[number + 1]]
        queries = own[own_ends[number] : own_ends[number + 1]]
        for start in range(0, len(here), CHUNK):
            some = here[start : start + CHUNK]
            similarity, which = exact(vectors.take(image[some]), seeds.at(queries), 1, gpu)
            picks.query[some], picks.similarity[some] = queries[which[:, 0]], similarity[:, 0]
        picks.rank[here[np.argsort(-picks.similarity[here], kind="stable")]] = np.arange(1, len(here) + 1)
    return picks
