"""Selects images of the clean pool by seeds or evenly: the stages clusters, search and retrieve.

The two retrievals of DINOv2 (arXiv 2304.07193, section 3 and appendix A.4), and a balanced sample (Vo et al.
2024, arXiv 2405.15613). The clean pool is the pool without duplicates and evaluation images.
"""

import math
from collections.abc import Callable, Mapping
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
from dinokit.curate.image_sets import Embeddings
from dinokit.curate.index import CHUNK, Searcher, Vectors, exact_search, save, shard_files
from dinokit.curate.settings import Config, Seeds, Share

FLOOR_SAMPLE = 1000  # seeds that the similarity floor is learnt from
MAX_CLUSTERS = 100_000  # as published
BALANCE, ALL = "balance", "all"  # origins besides the names of sets of seeds

# An image of the training set, with the reason for it.
SELECTED = np.dtype([
    ("image", "<i8"),  # of the pool; until select_images() ends, the row of the clean pool
    ("origin", "<i4"),  # number in origins()
    ("query", "<i8"),  # the image of these seeds that retrieved it, -1 for none
    ("rank", "<i8"),  # from 1, among the seed's candidates, or among its cluster's images; 0 without query
    ("similarity", "<f4"),  # to the query
    ("cluster", "<i8"),
])  # fmt: skip


def without_query(image: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """(m,) SELECTED: images (m,) of clusters (m,) that no seed retrieved."""
    table = np.zeros(len(image), SELECTED)
    table["image"], table["query"], table["cluster"] = image, -1, cluster
    return table


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


def write_candidates(searcher: Searcher, seeds: Vectors, k: int, folder: Path, share: Share) -> None:
    """Stage `search`: files of the k most similar images to each seed, 65,536 seeds a file."""
    for path, start in shard_files(folder, len(seeds), CHUNK, "npz", share):
        if not path.exists():
            similarity, rows = searcher.search(seeds.chunk(start), k)
            save(path, similarity=similarity, rows=rows)


def select_images(
    cfg: Config,
    rules: Mapping[str, Seeds],
    seeds: Mapping[str, Embeddings],
    pool: CleanPool,
    folder: Path,
    log: Callable[[str], None],
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

    def add(name: str, table: np.ndarray) -> None:
        """Add the images that no earlier origin selected."""
        table = table[~taken[table["image"]]]
        taken[table["image"]], table["origin"] = True, names.index(name)
        tables.append(table)
        counts[name] = len(table)

    for number, (name, rule) in enumerate(rules.items()):
        add(name, _retrieve(cfg, number, pool.candidates / name, rule, seeds[name], pool))
    if cfg.balance.images:
        image = _balanced(cfg, pool, folder, log)
        add(BALANCE, without_query(image, pool.row_cluster[image]))
    elif not rules:
        add(ALL, without_query(np.arange(len(clean.images)), pool.row_cluster))
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
) -> np.ndarray:
    """SELECTED images that the set of seeds with this number retrieves."""
    clean, gpu = pool.embeddings, cfg.index.gpu
    rng = np.random.default_rng([cfg.seed, 5, number])
    if rule.rule == "sample":
        files = [np.load(path) for path, _ in shard_files(candidates, len(seeds.images), CHUNK, "npz")]
        similarity, rows = (np.concatenate([file[key] for file in files]) for key in ("similarity", "rows"))
        if rule.strict:
            rows = np.where(similarity < similarity_floor(seeds.vectors, rule.strict, gpu, rng), -1, rows)
        table = retrieve_by_sample(similarity, rows, rule.k, pool.row_cluster)
    else:
        seed_cluster, _ = assign(seeds.vectors, pool.centres, gpu)
        table = retrieve_by_cluster(
            clean.vectors, pool.row_cluster, seeds.vectors, seed_cluster, rule, gpu, rng
        )
    table["query"] = seeds.images[table["query"]]
    return table


def _balanced(cfg: Config, pool: CleanPool, folder: Path, log: Callable[[str], None]) -> np.ndarray:
    clean = pool.embeddings
    if cfg.balance.images > len(clean.images):
        raise ValueError(
            f"balance.images={cfg.balance.images}, but {len(clean.images)} are left to draw from: "
            f"{removed_in_words(pool.status)}. Ask for fewer, or change "
            f"what removed them: dedup.similarity={cfg.dedup.similarity:g}, "
            f"dedup.against={cfg.dedup.against:g} or hash.bits={cfg.hash.bits}."
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


def retrieve_by_sample(similarity: np.ndarray, rows: np.ndarray, k: int, cluster: np.ndarray) -> np.ndarray:
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
        cluster: (n,) of each image.

    Returns:
        (m,) SELECTED, ascending by image.
    """
    free = np.ones(len(cluster), np.bool_)
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
    table = without_query(image, cluster[image])
    table["query"], table["rank"], table["similarity"] = query, place + 1, similarity[query, place]
    return table[np.argsort(image)]


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
) -> np.ndarray:
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

    Returns:
        (m,) SELECTED, ascending by image.
    """
    count = int(max(cluster.max(initial=-1), seed_cluster.max(initial=-1))) + 1
    sizes = np.bincount(cluster, minlength=count)
    hit = np.bincount(seed_cluster, minlength=count) > cfg.min_hits
    available = np.where(hit, np.minimum(sizes, cfg.per_cluster), 0)
    quotas = even_quotas(available, min(cfg.cap, int(available.sum())), rng)
    image = sample_clusters(cluster, quotas, None, rng)
    table = without_query(image, cluster[image])
    members, starts = sort_by_cluster(table["cluster"], count)
    seed_members, seed_starts = sort_by_cluster(seed_cluster, count)
    for number in np.unique(table["cluster"]):
        here = members[starts[number] : starts[number + 1]]
        queries = seed_members[seed_starts[number] : seed_starts[number + 1]]
        for start in range(0, len(here), CHUNK):
            some = here[start : start + CHUNK]
            similarity, nearest = exact_search(vectors.take(image[some]), seeds.select(queries), 1, gpu)
            table["query"][some], table["similarity"][some] = queries[nearest[:, 0]], similarity[:, 0]
        by_similarity = here[np.argsort(-table["similarity"][here], kind="stable")]
        table["rank"][by_similarity] = np.arange(1, len(here) + 1)
    return table
