"""Selects images of the clean pool by seeds or evenly: the stages clusters, search and retrieve.

The two retrievals of DINOv2 (arXiv 2304.07193, section 3 and appendix A.4), and a balanced sample (Vo et al.
2024, arXiv 2405.15613). The clean pool is the pool without duplicates and evaluation images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.clustering import (
    assign,
    balanced_sample,
    entropy,
    even_quotas,
    hierarchical_kmeans,
    kmeans,
    sample_clusters,
    sort_by_cluster,
)
from dinokit.curate.dedup import removed_in_words
from dinokit.curate.image_sets import CHUNK, Embeddings, Vectors
from dinokit.curate.index import Searcher, exact_search
from dinokit.curate.settings import Config, Seeds
from dinokit.curate.stages import Log, Share, save

QUERIES = 65_536  # seeds whose candidates are written to one file
FLOOR_SAMPLE = 1000  # seeds that the similarity floor is learnt from
MAX_CLUSTERS = 100_000  # as published
BALANCE, ALL = "balance", "all"  # origins besides the names of sets of seeds

# An image of the training set. `origin` is a number of origins(); `query` is the image of these seeds that
# retrieved it, -1 for none; `rank` and `similarity` are the image's for this query.
SELECTED = np.dtype(
    [
        ("image", "<i8"),
        ("origin", "<i4"),
        ("query", "<i8"),
        ("rank", "<i8"),
        ("similarity", "<f4"),
        ("cluster", "<i8"),
    ]
)


@dataclass
class Selection:
    """Images with the reason for each, all (m,)."""

    image: np.ndarray  # int64 row of the clean pool, ascending, each once
    query: np.ndarray  # int64 seed that retrieved it, -1 for none
    rank: np.ndarray  # int64 from 1: its rank among the seed's candidates, or among its cluster's images
    similarity: np.ndarray  # float32, to the seed
    cluster: np.ndarray  # int64 cluster of the image; -1 if not known

    @classmethod
    def without_query(cls, image: np.ndarray, cluster: np.ndarray) -> "Selection":
        """Images that no seed retrieved; `cluster` (m,) of each."""
        m = len(image)
        return cls(image, np.full(m, -1), np.zeros(m, np.int64), np.zeros(m, np.float32), cluster)


@dataclass
class CleanPool:
    """The clean pool, its clusters and the candidates of seeds."""

    embeddings: Embeddings
    status: np.ndarray  # (n,) Status of each image of the whole pool
    cluster: np.ndarray  # (n,) of each image of the whole pool, -1 without an embedding
    centres: np.ndarray  # (c, D) of the clusters
    candidates: Path  # folder of the stage `search`

    @property
    def row_cluster(self) -> np.ndarray:
        """The cluster of each row of the embeddings."""
        return self.cluster[self.embeddings.images]


def origins(rules: Mapping[str, Seeds]) -> list[str]:
    """The names that SELECTED's `origin` numbers."""
    return [*rules, BALANCE, ALL]


def cluster_pool(cfg: Config, pool: Embeddings, clean: Embeddings, n: int, folder: Path) -> dict[str, Any]:
    """Stage `clusters`: learn clusters of the clean pool, and assign every image of the pool to one.

    Writes clusters.npz: centres (c, D); cluster (n,), -1 without an embedding.
    """
    settings, gpu, rng = cfg.clusters, cfg.index.gpu, np.random.default_rng([cfg.seed, 3])
    count = min(settings.count or min(math.isqrt(len(clean.images)), MAX_CLUSTERS), len(clean.images))
    centres = kmeans(clean.vectors, count, settings.kmeans, gpu, rng)
    cluster = np.full(n, -1, np.int64)
    cluster[pool.images] = assign(pool.vectors, centres, gpu)[0]
    save(folder / "clusters.npz", centres=centres, cluster=cluster)
    sizes = np.bincount(cluster[clean.images], minlength=count)
    return {"clusters": count, "largest": int(sizes.max()), "entropy": round(entropy(sizes), 4)}


def search_candidates(searcher: Searcher, seeds: Vectors, k: int, folder: Path, share: Share) -> None:
    """Stage `search`: files of the k most similar images to each seed, 65,536 seeds a file."""
    for number in share.shards(-(-len(seeds) // QUERIES)):
        path = folder / f"{number:05d}.npz"
        if not path.exists():
            similarity, rows = searcher.search(seeds.chunk(number * QUERIES, QUERIES), k)
            save(path, similarity=similarity, rows=rows)


def _read_candidates(folder: Path, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    files = [np.load(folder / f"{number:05d}.npz") for number in range(-(-seeds // QUERIES))]
    return np.concatenate([f["similarity"] for f in files]), np.concatenate([f["rows"] for f in files])


def select_images(
    cfg: Config,
    rules: Mapping[str, Seeds],
    seeds: Mapping[str, Embeddings],
    pool: CleanPool,
    folder: Path,
    log: Log,
) -> dict[str, Any]:
    """Stage `retrieve`: each set of seeds in turn, then balance. Writes selection.npy: SELECTED, by image.

    An image that several of them select is noted with the first.

    Args:
        cfg: the settings.
        rules: by the name of a set of seeds.
        seeds: their embeddings, by name.
        pool: the clean pool.
        folder: of selection.npy.
        log: takes lines for the screen.

    Raises:
        ValueError: if no image is selected, or balance.images asks for more than there are.
    """
    clean, names = pool.embeddings, origins(rules)
    taken = np.zeros(len(clean.images), np.bool_)
    tables: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for number, (name, rule) in enumerate(rules.items()):
        selection = _retrieve(cfg, number, pool.candidates / name, rule, seeds[name], pool)
        tables.append(_new_rows(selection, number, taken))
        counts[name] = len(tables[-1])
    if cfg.balance.images:
        image = _balanced(cfg, pool, folder, log)
        selection = Selection.without_query(image, pool.row_cluster[image])
        tables.append(_new_rows(selection, names.index(BALANCE), taken))
        counts[BALANCE] = len(tables[-1])
    elif not rules:
        selection = Selection.without_query(np.arange(len(clean.images)), pool.row_cluster)
        tables.append(_new_rows(selection, names.index(ALL), taken))
    table = np.concatenate(tables)
    if not len(table):
        raise ValueError(_nothing_selected(rules, pool))
    table = table[np.argsort(table["image"])]
    table["image"] = clean.images[table["image"]]
    save(folder / "selection.npy", table)
    sizes = np.bincount(table["cluster"], minlength=len(pool.centres))
    figures = {"images": len(table), "entropy": round(entropy(sizes), 4), "retrieved": counts}
    requested = sum(rule.k * len(seeds[name].images) for name, rule in rules.items() if rule.rule == "sample")
    if requested > len(clean.images):
        figures["note"] = (
            f"The seeds ask for {requested:,} images (k each), but {len(clean.images):,} are left: "
            f"{removed_in_words(pool.status)}."
        )
    return figures


def _retrieve(
    cfg: Config, number: int, candidates: Path, rule: Seeds, seeds: Embeddings, pool: CleanPool
) -> Selection:
    """What the set of seeds with this number retrieves."""
    clean, gpu = pool.embeddings, cfg.index.gpu
    rng = np.random.default_rng([cfg.seed, 5, number])
    if rule.rule == "sample":
        similarity, rows = _read_candidates(candidates, len(seeds.images))
        if rule.strict:
            rows = np.where(similarity < similarity_floor(seeds.vectors, rule.strict, gpu, rng), -1, rows)
        selection = retrieve_by_sample(similarity, rows, rule.k, len(clean.images))
        selection.cluster = pool.row_cluster[selection.image]
    else:
        seed_cluster, _ = assign(seeds.vectors, pool.centres, gpu)
        selection = retrieve_by_cluster(
            clean.vectors, pool.row_cluster, seeds.vectors, seed_cluster, rule, gpu, rng
        )
    selection.query = seeds.images[selection.query]
    return selection


def _new_rows(selection: Selection, origin: int, taken: np.ndarray) -> np.ndarray:
    """The images that were not taken before, as SELECTED; marks them as taken."""
    free = ~taken[selection.image]
    taken[selection.image] = True
    table = np.empty(int(free.sum()), SELECTED)
    for name in ("image", "query", "rank", "similarity", "cluster"):
        table[name] = getattr(selection, name)[free]
    table["origin"] = origin
    return table


def _balanced(cfg: Config, pool: CleanPool, folder: Path, log: Log) -> np.ndarray:
    clean = pool.embeddings
    if cfg.balance.images > len(clean.images):
        raise ValueError(
            f"balance.images={cfg.balance.images}, but {len(clean.images)} are left to draw from: "
            f"{removed_in_words(pool.status)}. Ask for fewer, or change the threshold that removed them."
        )
    levels, distance = hierarchical_kmeans(clean.vectors, cfg.balance, cfg.index.gpu, cfg.seed, folder, log)
    central = distance if cfg.balance.draw == "central" else None
    return balanced_sample(levels, central, cfg.balance.images, np.random.default_rng([cfg.seed, 6]))


def _nothing_selected(rules: Mapping[str, Seeds], pool: CleanPool) -> str:
    """Why no image is selected, and what to change."""
    by_sample = [name for name, rule in rules.items() if rule.rule == "sample"]
    by_cluster = [name for name, rule in rules.items() if rule.rule == "cluster"]
    sentences = ["No image is selected."]
    if by_sample:
        sentences.append(
            f"No image is as similar to a seed of {', '.join(by_sample)} as seeds.NAME.strict asks. Lower "
            f"strict."
        )
    if by_cluster:
        sentences.append(
            f"No cluster has more than seeds.NAME.min_hits seeds of {', '.join(by_cluster)}. Lower min_hits, "
            f"use fewer clusters (clusters.count={len(pool.centres)}), or rule=sample."
        )
    return " ".join(sentences)


def retrieve_by_sample(similarity: np.ndarray, rows: np.ndarray, k: int, n: int) -> Selection:
    """The k nearest images of each seed (rule=sample).

    Each seed has more than k candidates, so that an image goes to one seed only and the other seeds take
    their next one: k new images a seed, as in the published numbers (4 * 14,197,086 = 56,788,344). With k
    candidates, an image that several seeds ask for goes to the most similar of them; the others get fewer.

    In every round each seed with fewer than k images asks for its next candidate. A free image goes to the
    most similar seed that asks for it; of equally similar seeds, to the first.

    Args:
        similarity: (q, w), descending.
        rows: (q, w) images, -1 for none.
        k: images a seed.
        n: images in total.
    """
    free = np.ones(n, np.bool_)
    count = np.zeros(len(rows), np.int64)
    won: list[np.ndarray] = []
    for place in range(rows.shape[1]):
        asking = np.flatnonzero((count < k) & (rows[:, place] >= 0))
        asking = asking[free[rows[asking, place]]]
        asking = asking[np.lexsort((asking, -similarity[asking, place]))]  # the most similar first
        image, first = np.unique(rows[asking, place], return_index=True)
        query = asking[first]
        count[query] += 1
        free[image] = False
        won.append(np.stack([image, query, np.full(len(image), place)]))
    image, query, place = np.concatenate(won, axis=1)
    order = np.argsort(image)
    image, query, place = image[order], query[order], place[order]
    return Selection(image, query, place + 1, similarity[query, place], np.full(len(image), -1))


def similarity_floor(seeds: Vectors, strict: float, gpu: bool, rng: np.random.Generator) -> float:
    """The least similarity to a seed that an image must have, learnt from how similar the seeds are.

    Args:
        seeds: a single seed gives no floor: -1.
        strict: the quantile of the seeds' similarity to the nearest other seed.
        gpu: whether to use the GPUs that faiss sees.
        rng: draws the sample of seeds.
    """
    sample = np.sort(rng.choice(len(seeds), min(len(seeds), FLOOR_SAMPLE), replace=False))
    similarity, rows = exact_search(seeds.take(sample), seeds, 2, gpu)
    # The nearest row is the seed itself, or an equal one.
    other = np.where(rows[:, 0] == sample, similarity[:, 1], similarity[:, 0])
    return float(np.quantile(other, strict)) if len(seeds) > 1 else -1.0


def retrieve_by_cluster(
    vectors: Vectors,
    cluster: np.ndarray,
    seeds: Vectors,
    seed_cluster: np.ndarray,
    cfg: Seeds,
    gpu: bool,
    rng: np.random.Generator,
) -> Selection:
    """Random images of the clusters that seeds hit (rule=cluster).

    A cluster with more than `min_hits` seeds gives up to `per_cluster` images, all clusters together `cap`,
    as evenly as they can.

    Args:
        vectors: the images searched.
        cluster: (n,) of each image.
        seeds: the seeds.
        seed_cluster: (q,) of each seed.
        cfg: min_hits, per_cluster and cap.
        gpu: whether to use the GPUs that faiss sees.
        rng: draws the images.
    """
    count = int(max(cluster.max(initial=-1), seed_cluster.max(initial=-1))) + 1
    sizes = np.bincount(cluster, minlength=count)
    hit = np.bincount(seed_cluster, minlength=count) > cfg.min_hits
    available = np.where(hit, np.minimum(sizes, cfg.per_cluster), 0)
    quotas = even_quotas(available, min(cfg.cap, int(available.sum())), rng)
    image = sample_clusters(cluster, quotas, None, rng)
    selection = Selection.without_query(image, cluster[image])
    members, starts = sort_by_cluster(selection.cluster, count)
    seed_members, seed_starts = sort_by_cluster(seed_cluster, count)
    for number in np.unique(selection.cluster):
        here = members[starts[number] : starts[number + 1]]
        queries = seed_members[seed_starts[number] : seed_starts[number + 1]]
        for start in range(0, len(here), CHUNK):
            some = here[start : start + CHUNK]
            similarity, nearest = exact_search(vectors.take(image[some]), seeds.select(queries), 1, gpu)
            selection.query[some], selection.similarity[some] = queries[nearest[:, 0]], similarity[:, 0]
        by_similarity = here[np.argsort(-selection.similarity[here], kind="stable")]
        selection.rank[by_similarity] = np.arange(1, len(here) + 1)
    return selection
