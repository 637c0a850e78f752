"""The stages `clusters`, `search` and `retrieve`: what of the clean pool is taken, and why."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.balance import draw, entropy
from dinokit.curate.copies import what_went
from dinokit.curate.embedding import Embedded
from dinokit.curate.hierarchy import grow
from dinokit.curate.index import Searcher
from dinokit.curate.kmeans import cluster, nearest
from dinokit.curate.retrieve import Picks, award, by_cluster_hits, floor_of
from dinokit.curate.seeds import Config as Seeds
from dinokit.curate.settings import Config
from dinokit.curate.stages import Share, Told, save
from dinokit.curate.vectors import Vectors

QUERIES = 65_536  # seeds whose candidates make a file
MOST_CLUSTERS = 100_000  # as published
BALANCE, ALL = "balance", "all"  # origins beside the names of seeds

# An image of the pool; a number of origins(); an image of these seeds, and its place and likeness for that.
PICK = np.dtype(
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
class Known:
    """Of the clean pool."""

    left: Embedded
    fate: np.ndarray  # (n,) of each image of the whole pool
    cluster: np.ndarray  # (n,) of each image of the whole pool, -1 without an embedding
    centres: np.ndarray  # (c, D) of those clusters
    found: Path  # the folder of the stage `search`


def origins(rules: Mapping[str, Seeds]) -> list[str]:
    """What an `origin` numbers."""
    return [*rules, BALANCE, ALL]


def clusters(cfg: Config, pool: Embedded, left: Embedded, n: int, folder: Path) -> dict[str, Any]:
    """Learn the clusters of what is left, and say the cluster of every image of the pool.

    Leaves clusters.npz: centres (c, D); cluster (n,), -1 without an embedding.
    """
    own, gpu, rng = cfg.clusters, cfg.index.gpu, np.random.default_rng([cfg.seed, 3])
    count = min(own.count or min(math.isqrt(len(left.images)), MOST_CLUSTERS), len(left.images))
    centres = cluster(left.vectors, count, own.kmeans, gpu, rng)
    which = np.full(n, -1, np.int64)
    which[pool.images] = nearest(pool.vectors, centres, gpu)[0]
    save(folder / "clusters.npz", centres=centres, cluster=which)
    sizes = np.bincount(which[left.images], minlength=count)
    return {"clusters": count, "largest": int(sizes.max()), "entropy": round(entropy(sizes), 4)}


def search(searcher: Searcher, seeds: Vectors, wide: int, folder: Path, share: Share) -> None:
    """Files of the `wide` most similar images to each seed, 65,536 seeds a file."""
    for number in share.mine(-(-len(seeds) // QUERIES)):
        path = folder / f"{number:05d}.npz"
        if not path.exists():
            similarity, rows = searcher.search(seeds.chunk(number * QUERIES, QUERIES), wide)
            save(path, similarity=similarity, rows=rows)


def choose(
    cfg: Config,
    rules: Mapping[str, Seeds],
    seeds: Mapping[str, Embedded],
    known: Known,
    folder: Path,
    told: Told,
) -> dict[str, Any]:
    """Every set of seeds in turn, then balance; an image that several bring is noted with the first.

    Args:
        cfg: the settings.
        rules: by the name of a set of seeds.
        seeds: their embeddings.
        known: of the clean pool.
        folder: gets picks.npy: PICKs, ascending by image.
        told: takes lines for the screen.
    """
    left, names = known.left, origins(rules)
    taken = np.zeros(len(left.images), np.bool_)
    columns: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for number, (name, rule) in enumerate(rules.items()):
        picks = _brought(cfg, number, known.found / name, rule, seeds[name], known)
        columns.append(_rows(picks, number, taken))
        counts[name] = columns[-1].shape[0]
    inside = known.cluster[left.images]
    if cfg.balance.images:
        image = _balanced(cfg, known, folder, told)
        columns.append(_rows(_plain(image, inside), names.index(BALANCE), taken))
        counts[BALANCE] = columns[-1].shape[0]
    elif not rules:
        columns.append(_rows(_plain(np.arange(len(left.images)), inside), names.index(ALL), taken))
    table = np.concatenate(columns)
    if not len(table):
        raise ValueError(_nothing(rules, known))
    table = table[np.argsort(table["image"])]
    table["image"] = left.images[table["image"]]
    save(folder / "picks.npy", only=table)
    sizes = np.bincount(table["cluster"], minlength=len(known.centres))
    figures = {"images": len(table), "entropy": round(entropy(sizes), 4), "brought": counts}
    asked = sum(rule.k * len(seeds[name].images) for name, rule in rules.items() if rule.rule == "sample")
    if asked > len(left.images):
        figures["note"] = (
            f"The seeds ask for {asked:,} images (k each), but {len(left.images):,} are left to take from: "
            f"{what_went(known.fate)}."
        )
    return figures


def _brought(cfg: Config, number: int, found: Path, rule: Seeds, own: Embedded, known: Known) -> Picks:
    """What a set of seeds brings, the number-th."""
    left, gpu = known.left, cfg.index.gpu
    inside = known.cluster[left.images]
    rng = np.random.default_rng([cfg.seed, 5, number])
    if rule.rule == "sample":
        similarity, rows = _candidates(found, len(own.images))
        if rule.strict:
            rows = np.where(similarity < floor_of(own.vectors, rule.strict, gpu, rng), -1, rows)
        picks = award(similarity, rows, rule.k, len(left.images))
        picks.cluster = inside[picks.image]
    else:
        hit, _ = nearest(own.vectors, known.centres, gpu)
        picks = by_cluster_hits(left.vectors, inside, own.vectors, hit, rule, gpu, rng)
    picks.query = own.images[picks.query]
    return picks


def _nothing(rules: Mapping[str, Seeds], known: Known) -> str:
    """Why nothing is picked, and what to do."""
    strict = [name for name, rule in rules.items() if rule.rule == "sample"]
    few = [name for name, rule in rules.items() if rule.rule == "cluster"]
    said = ["Nothing is picked."]
    if strict:
        said.append(f"No image is as like one of {', '.join(strict)} as seeds.NAME.strict asks: lower that.")
    if few:
        said.append(
            f"No cluster has more than seeds.NAME.min_hits seeds of {', '.join(few)}. Lower min_hits, take "
            f"fewer clusters (clusters.count={len(known.centres)}), or rule=sample."
        )
    return " ".join(said)


def _rows(picks: Picks, origin: int, taken: np.ndarray) -> np.ndarray:
    """The picks that nothing took before, as PICKs; marks them."""
    free = ~taken[picks.image]
    taken[picks.image] = True
    done = np.empty(int(free.sum()), PICK)
    for name in ("image", "query", "rank", "similarity", "cluster"):
        done[name] = getattr(picks, name)[free]
    done["origin"] = origin
    return done


def _plain(image: np.ndarray, cluster: np.ndarray) -> Picks:
    none = np.full(len(image), -1)
    return Picks(
        image, none, np.zeros(len(image), np.int64), np.zeros(len(image), np.float32), cluster[image]
    )


def _balanced(cfg: Config, known: Known, folder: Path, told: Told) -> np.ndarray:
    left = known.left
    if cfg.balance.images > len(left.images):
        raise ValueError(
            f"balance.images={cfg.balance.images}, but {len(left.images)} are left to draw from: "
            f"{what_went(known.fate)}. Ask for fewer, or move the threshold that took them."
        )
    levels, distance = grow(left.vectors, cfg.balance, cfg.index.gpu, cfg.seed, folder, told)
    central = distance if cfg.balance.draw == "central" else None
    return draw(levels, central, cfg.balance.images, np.random.default_rng([cfg.seed, 6]))


def _candidates(folder: Path, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.load(folder / f"{number:05d}.npz") for number in range(-(-seeds // QUERIES))]
    return np.concatenate([p["similarity"] for p in parts]), np.concatenate([p["rows"] for p in parts])
