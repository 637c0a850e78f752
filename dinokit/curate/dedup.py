"""Finds duplicates by embedding (DINOv2, arXiv 2304.07193, appendix A.3): stages neighbours, dedup, overlap.

n  images of the pool     m  rows of it with an embedding     k  neighbours
"""

from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.image_sets import Embeddings
from dinokit.curate.index import Searcher, measure_recall, recall_of_pairs, save, shard_files
from dinokit.curate.settings import Dedup, Share

QUERIES = 65_536  # rows whose neighbours are written to one file
SUSPICIOUS = 0.1  # share of the images that makes a group of duplicates suspicious
EDGE = np.dtype([("a", "<i8"), ("b", "<i8"), ("similarity", "<f4")])


class Status(IntEnum):
    """What was decided about an image of the pool."""

    CLEAN = 0
    UNREADABLE = 1  # or its embedding has no direction
    EXACT = 2  # the same pixels as another image
    NEAR = 3  # a near duplicate, by hash
    DUPLICATE = 4  # a duplicate, by embedding
    OVERLAP = 5  # it, or a duplicate of it, shows an evaluation image


REASONS = {
    Status.UNREADABLE: "cannot be read, or has no embedding",
    Status.EXACT: "same pixels as another image",
    Status.NEAR: "near duplicate of another image, by hash",
    Status.DUPLICATE: "duplicate of another image, by embedding",
    Status.OVERLAP: "shows an evaluation image, or is a duplicate of one that does",
}


def removed_in_words(status: np.ndarray) -> str:
    """How many images of the pool were removed, and why; status (n,)."""
    counts = {reason: int((status == kind).sum()) for kind, reason in REASONS.items()}
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in counts.items() if count)
    return f"of {len(status):,} images {sum(counts.values()):,} were removed ({reasons or 'none'})"


def load_status(folder: Path, name: str = "status.npz") -> dict[str, np.ndarray]:
    """The arrays of status.npz or groups.npz. Earlier versions wrote `fate` for status."""
    file = folder / name
    with np.load(file if file.exists() else folder / "fate.npz") as arrays:
        return {"status" if key == "fate" else key: arrays[key] for key in arrays.files}


class Components:
    """Connected components of n points: a disjoint-set forest in one array.

    Edges are added in batches, so a billion of them need not be in memory, as scipy would have it.
    """

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)  # never larger than the point itself; equal to it at a root

    def add_edges(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add edges between points a (m,) and b (m,).

        In each round the larger root of every edge is attached to the smallest root that it has an edge to;
        edges within a tree are dropped. A root is only ever attached to a smaller one, so there is no cycle.
        """
        while len(a):
            a, b = self._root(a), self._root(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def labels(self) -> np.ndarray:
        """(n,) int64: the smallest point of each point's component."""
        self._parent = self._root(np.arange(len(self._parent)))
        return self._parent

    def _root(self, points: np.ndarray) -> np.ndarray:
        """The roots of points. Every point on the way is attached to its grandparent, which halves paths."""
        parent, current = self._parent, points
        while True:
            up = parent[current]
            above = parent[up]
            if np.array_equal(up, above):
                return parent[points]
            parent[current] = above
            parent[up] = parent[above]


def groups(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points sorted by label, and where each group of two or more starts.

    Returns:
        (m,) points of such groups, group after group, ascending within each; (g + 1,) offsets into them.
    """
    order = np.argsort(labels, kind="stable")
    _, sizes = np.unique(labels, return_counts=True)
    several = np.repeat(sizes > 1, sizes)
    return order[several], np.cumsum([0, *sizes[sizes > 1]])


def representatives(label: np.ndarray, pixels: np.ndarray | None, candidates: np.ndarray) -> np.ndarray:
    """For each image the one that represents its group.

    Args:
        label: (n,) of each image's group: an image of it.
        pixels: (n,), to choose the first of the images with most pixels; None: the first image.
        candidates: (n,) bool: which images may represent a group; in a group without one, each image
            represents itself.
    """
    images = np.flatnonzero(candidates)
    if pixels is not None:
        images = images[np.argsort(-pixels[images].astype(np.float64), kind="stable")]
    names, first = np.unique(label[images], return_index=True)
    chosen = np.full(len(label), -1)
    chosen[names] = images[first]
    return np.where(chosen[label] >= 0, chosen[label], np.arange(len(label)))


def write_edges(searcher: Searcher, k: int, threshold: float, folder: Path, share: Share) -> None:
    """Stage `neighbours`: pairs of rows with a similarity above `threshold`, a file for every 65,536 rows."""
    for path, start in shard_files(folder, len(searcher.vectors), QUERIES, share=share):
        if not path.exists():
            found = searcher.search(searcher.vectors.chunk(start, QUERIES), k + 1)
            save(path, _edges(*found, start, threshold))


def _edges(similarity: np.ndarray, rows: np.ndarray, start: int, threshold: float) -> np.ndarray:
    """EDGEs of the neighbours (q, k + 1) of the rows from `start`, the smaller row of each edge first."""
    query = np.arange(start, start + len(rows))[:, None]
    near = (similarity > threshold) & (rows != query) & (rows >= 0)
    near[:, -1] &= (rows == query).any(axis=1)  # k neighbours besides itself, also if it is not among them
    a, b = np.broadcast_to(query, rows.shape)[near], rows[near]
    edges = np.empty(len(a), EDGE)
    edges["a"], edges["b"], edges["similarity"] = np.minimum(a, b), np.maximum(a, b), similarity[near]
    return edges


def read_edges(folder: Path, rows: int) -> Iterator[np.ndarray]:
    """The files of write_edges()."""
    return (np.load(path) for path, _ in shard_files(folder, rows, QUERIES))


def group_duplicates(
    pool: Embeddings,
    images: np.ndarray,
    hashes: Mapping[str, np.ndarray],
    edges: Iterator[np.ndarray],
    cfg: Dedup,
    folder: Path,
) -> dict[str, Any]:
    """Stage `dedup`: groups of duplicates, by hash and by embedding together.

    Writes groups.npz, (n,) each: status; keeper, the image that represents the group; label, the group's
    smallest image.

    Args:
        pool: the embeddings of the pool.
        images: the images that were to be embedded.
        hashes: status.npz of the stage `hash`.
        edges: EDGEs between rows.
        cfg: which image represents a group, and the similarity that made the edges.
        folder: of groups.npz.
    """
    status = hashes["status"]
    status[np.setdiff1d(images, pool.images, assume_unique=True)] = Status.UNREADABLE
    components = Components(len(status))
    components.add_edges(np.arange(len(status)), hashes["of"])
    for some in edges:
        components.add_edges(pool.images[some["a"]], pool.images[some["b"]])
    label, distinct = components.labels(), status == Status.CLEAN
    keeper = representatives(label, hashes["pixels"] if cfg.keep == "largest" else None, distinct)
    status[distinct & (keeper != np.arange(len(status)))] = Status.DUPLICATE
    save(folder / "groups.npz", status=status, keeper=keeper, label=label)
    sizes = np.bincount(label)
    return {
        "left": int((status == Status.CLEAN).sum()),
        "duplicates": int((status == Status.DUPLICATE).sum()),
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        **_suspicion(np.bincount(label[distinct]), cfg.similarity),
    }


def _suspicion(sizes: np.ndarray, threshold: float) -> dict[str, str]:
    """A note if one group has much of the pool; sizes (c,) without the duplicates by hash."""
    most, n = int(sizes.max(initial=0)), int(sizes.sum())
    if most < max(SUSPICIOUS * n, 20):
        return {}
    return {
        "note": f"One group of duplicates has {most:,} of {n:,} images ({most / n:.0%}); only one of them "
        f"stays. Either the pool is full of one picture, or these features find all images similar, as "
        f"those of a backbone do that was trained for a short time or on other images. See 'Groups of "
        f"duplicates' in report.html. If they are no duplicates, raise dedup.similarity ({threshold:g}), or "
        f"give better weights, or dedup.weights for duplicates."
    }


def remove_overlap(
    pool: Embeddings,
    others: Mapping[str, tuple[Searcher, np.ndarray]],
    threshold: float,
    seed: int,
    grouped: Mapping[str, np.ndarray],
    by_hash: np.ndarray,
    folder: Path,
) -> dict[str, Any]:
    """Stage `overlap`: removes every group of duplicates that shows an evaluation image, with all its images.

    Writes status.npz: status (n,); shown (s, 4): image of the pool, number of the evaluation set, image of
    it, similarity (1 by hash).

    Args:
        pool: the embeddings of the pool, duplicates included.
        others: by label of an evaluation set: its index, and the image of each row.
        threshold: a similarity.
        seed: of the sample that measures approximate indexes.
        grouped: groups.npz of the stage `dedup`.
        by_hash: (s, 3) the same columns without the similarity: matches by hash.
        folder: of status.npz.
    """
    matches = [np.column_stack([by_hash, np.ones(len(by_hash))])]
    recall = {}
    for number, (name, (searcher, images)) in enumerate(others.items()):
        if not searcher.exact:
            measured = measure_recall(searcher, 1, seed, searcher.folder, pool.vectors)
            recall[name] = {**measured, **recall_of_pairs(searcher.folder, threshold)}
        for start, x in pool.vectors.chunks():
            similarity, rows = (array[:, 0] for array in searcher.search(x, 1))
            hit = np.flatnonzero(similarity > threshold)
            columns = pool.images[start + hit], np.full(len(hit), number), images[rows[hit]], similarity[hit]
            matches.append(np.column_stack(columns))
    shown = np.concatenate(matches)
    status, label = grouped["status"], grouped["label"]
    in_overlap = np.zeros(len(label), np.bool_)  # by label
    in_overlap[label[shown[:, 0].astype(np.int64)]] = True
    status[in_overlap[label] & (status != Status.UNREADABLE)] = Status.OVERLAP
    save(folder / "status.npz", status=status, shown=shown)
    return {
        "left": int((status == Status.CLEAN).sum()),
        "showing_evaluation_images": len(np.unique(shown[:, 0])),
        "removed_with_their_groups": int((status == Status.OVERLAP).sum()),
        **recall,
    }
