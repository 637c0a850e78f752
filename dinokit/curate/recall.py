"""What an approximate index finds of what exact search finds, on a sample of queries."""

from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.index import Searcher, exact
from dinokit.curate.stages import save
from dinokit.curate.vectors import Vectors

FILE = "recall.npz"


def measure(
    searcher: Searcher, k: int, seed: int, folder: Path, asks: Vectors | None = None
) -> dict[str, Any]:
    """Search `index.recall` queries both ways.

    Args:
        searcher: the index.
        k: how many of the most similar rows are looked for.
        seed: of the sample.
        folder: gets recall.npz, similarity (s, k) of the rows that exact search finds, and found (s, k) bool,
            whether the index finds them too; unless the index is exact itself.
        asks: the sample's rows are drawn from these; None: from the rows of the index.

    Returns:
        kind: of the index, in words; recall: the share found.
    """
    if searcher.exact:
        return {"kind": searcher.kind}
    asks = searcher.vectors if asks is None else asks
    k, rng = min(k, len(searcher.vectors)), np.random.default_rng([seed, 1])
    rows = np.sort(rng.choice(len(asks), min(searcher.cfg.recall, len(asks)), replace=False))
    queries = asks.take(rows)
    similarity, there = exact(queries, searcher.vectors, k, searcher.cfg.gpu)
    _, seen = searcher.search(queries, k)
    found = np.stack([np.isin(t, s) for t, s in zip(there, seen, strict=True)])
    if asks is searcher.vectors:
        similarity[there == rows[:, None]] = -np.inf  # a row always finds itself: no merit
    save(folder / FILE, similarity=similarity, found=found)
    return {"kind": searcher.kind, "recall": round(float(found.mean()), 4)}


def recall_above(folder: Path, threshold: float) -> dict[str, Any]:
    """The same of those that are more similar than `threshold`, and how many of them the sample has.

    Nothing of an exact index, nor of a sample without such pairs.
    """
    if not (folder / FILE).exists():
        return {}
    with np.load(folder / FILE) as said:
        hit = said["found"][said["similarity"] > threshold]
    share = {"recall_of_pairs": round(float(hit.mean()), 4)} if len(hit) else {}
    return {**share, "pairs_in_the_sample": len(hit)}
