"""Copies by embedding: within the pool, and of evaluation images (DINOv2, arXiv 2304.07193, appendix A.3).

n  images of the pool     m  rows of it with an embedding     k  neighbours
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.components import Components
from dinokit.curate.copies import Fate, representatives
from dinokit.curate.embedding import Embedded
from dinokit.curate.index import Searcher
from dinokit.curate.recall import measure, recall_above
from dinokit.curate.stages import Share, save
from dinokit.curate.vectors import Vectors

QUERIES = 65_536  # rows whose neighbours make a file
MUCH = 0.1  # share of the images that makes a group of copies suspicious
EDGE = np.dtype([("a", "<i8"), ("b", "<i8"), ("similarity", "<f4")])


def write_edges(searcher: Searcher, k: int, above: float, folder: Path, share: Share) -> None:
    """A file of EDGEs for every 65,536 rows: pairs with a similarity over `above`, the smaller row first."""
    for number in share.mine(shards(len(searcher.vectors))):
        path = folder / f"{number:05d}.npy"
        if not path.exists():
            start = number * QUERIES
            queries = searcher.vectors.chunk(start, QUERIES)
            save(path, only=_edges(*searcher.search(queries, k + 1), start, above))


def shards(rows: int) -> int:
    """Files that the rows' neighbours make."""
    return -(-rows // QUERIES)


def _edges(similarity: np.ndarray, rows: np.ndarray, start: int, above: float) -> np.ndarray:
    own = np.arange(start, start + len(rows))[:, None]
    near = (similarity > above) & (rows != own) & (rows >= 0)
    near[:, -1] &= (rows == own).any(axis=1)  # k neighbours beside itself; if it is not among them, one less
    a, b = np.broadcast_to(own, rows.shape)[near], rows[near]
    edges = np.empty(len(a), EDGE)
    edges["a"], edges["b"], edges["similarity"] = np.minimum(a, b), np.maximum(a, b), similarity[near]
    return edges


def read_edges(folder: Path, rows: int) -> Iterator[np.ndarray]:
    """The files of write_edges()."""
    for number in range(shards(rows)):
        yield np.load(folder / f"{number:05d}.npy")


def group(
    images: np.ndarray,
    edges: Iterator[np.ndarray],
    fate: np.ndarray,
    of: np.ndarray,
    pixels: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of copies, by hash and by embedding together.

    Args:
        images: (m,) the image of each row.
        edges: between rows.
        fate: (n,) after the stage `hash`; images that have no embedding are unreadable by now.
        of: (n,) from there.
        pixels: (n,), to keep the largest of a group; None: the first.

    Returns:
        (n,) fate; (n,) the image kept in its place; (n,) label of its group, the smallest image of it.
    """
    joined = Components(len(fate))
    joined.join(np.arange(len(fate)), of)
    for part in edges:
        joined.join(images[part["a"]], images[part["b"]])
    label, fate = joined.labels(), fate.copy()
    able = fate == Fate.KEPT
    keeper = representatives(label, pixels, able)
    fate[able & (keeper != np.arange(len(fate)))] = Fate.DUPLICATE
    return fate, keeper, label


def strangers(
    vectors: Vectors, images: np.ndarray, others: Searcher, above: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(s,) images of the pool that show one of `others`, (s,) the nearest of these, (s,) similarity."""
    found = []
    for start, x in vectors.chunks():
        similarity, rows = others.search(x, 1)
        hit = np.flatnonzero(similarity[:, 0] > above)
        found.append((images[start + hit], rows[hit, 0], similarity[hit, 0]))
    image, other, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    return image, other, similarity


def drop_groups(fate: np.ndarray, label: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(n,) fate, when every group with one of the images `seen` goes out, all of it."""
    bad = np.zeros(len(label), np.bool_)
    bad[label[seen]] = True
    return np.where(bad[label] & (fate != Fate.UNREADABLE), Fate.OVERLAP, fate).astype(np.uint8)


def overlap(
    pool: Embedded,
    others: Mapping[str, tuple[Searcher, np.ndarray]],
    above: float,
    seed: int,
    grouped: Path,
    seen: np.ndarray,
    folder: Path,
) -> dict[str, Any]:
    """What shows an evaluation image goes out, with all of its group.

    Args:
        pool: all that was embedded, copies too.
        others: of each evaluation set, by its label, the index and the images of its rows.
        above: a similarity.
        seed: of the sample that approximate indexes are measured on.
        grouped: the folder of the stage `dedup`.
        seen: (s, 3) image of the pool, number of the set, image of it: those that hashes found.
        folder: gets fate.npz: fate (n,); shown (s, 4): image, set, its image, similarity (1 by hash).
    """
    with np.load(grouped / "groups.npz") as said:
        fate, label = said["fate"], said["label"]
    columns = [np.column_stack([seen, np.ones(len(seen))])]
    measured = {}
    for number, (label_of, (searcher, images)) in enumerate(others.items()):
        if not searcher.exact:
            said_of = measure(searcher, 1, seed, searcher.folder, pool.vectors)
            measured[label_of] = {**said_of, **recall_above(searcher.folder, above)}
        image, other, similarity = strangers(pool.vectors, pool.images, searcher, above)
        columns.append(np.column_stack([image, np.full(len(image), number), images[other], similarity]))
    shown = np.concatenate(columns)
    fate = drop_groups(fate, label, shown[:, 0].astype(np.int64))
    save(folder / "fate.npz", fate=fate, shown=shown)
    return {
        "kept": int((fate == Fate.KEPT).sum()),
        "showing_evaluation_images": len(np.unique(shown[:, 0])),
        "out_with_their_groups": int((fate == Fate.OVERLAP).sum()),
        **measured,
    }


def dedup(
    pool: Embedded, asked: np.ndarray, hashed: Path, edges: Path, largest: bool, above: float, folder: Path
) -> dict[str, Any]:
    """Groups of copies, and the one of each that stays.

    Args:
        pool: all that was embedded.
        asked: numbers of the images that should have been.
        hashed: the folder of the stage `hash`.
        edges: the folder of write_edges().
        largest: keep the one with most pixels, not the first.
        above: the similarity that made the edges.
        folder: gets groups.npz: fate, keeper and label, (n,) each, as group() gives them.
    """
    with np.load(hashed / "fate.npz") as said:
        fate, of, pixels = said["fate"], said["of"], said["pixels"]
    fate[np.setdiff1d(asked, pool.images, assume_unique=True)] = Fate.UNREADABLE
    apart = fate == Fate.KEPT
    found = read_edges(edges, len(pool.images))
    fate, keeper, label = group(pool.images, found, fate, of, pixels if largest else None)
    save(folder / "groups.npz", fate=fate, keeper=keeper, label=label)
    sizes = np.bincount(label)
    return {
        "kept": int((fate == Fate.KEPT).sum()),
        "duplicates": int((fate == Fate.DUPLICATE).sum()),
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        **_suspicion(np.bincount(label[apart]), above),
    }


def _suspicion(sizes: np.ndarray, above: float) -> dict[str, str]:
    """A note, if embeddings made one group of much of the pool; sizes (c,) without copies by hash."""
    most, n = int(sizes.max(initial=0)), int(sizes.sum())
    if most < max(MUCH * n, 20):
        return {}
    return {
        "note": f"One group of copies holds {most:,} of {n:,} images ({most / n:.0%}); all but one go. "
        f"Either the pool is full of one picture, or these features find all alike, as those of a backbone "
        f"do that was trained little or on other images. See 'Groups of copies' in report.html; if they are "
        f"no copies, raise dedup.similarity ({above:g}), or give better weights, or dedup.weights for copies."
    }
