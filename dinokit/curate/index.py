"""Nearest neighbours: the only file that imports faiss.

Up to `exact_below` rows every pair is compared. Above, an inverted file is learnt from a sample and lies on
disk in shards, which a search maps into memory one after the other:

    FOLDER/index.json  what it is, and its recall     trained.faiss  lists without rows     00000.faiss ...

Each shard is whole or not there, so a build that was killed goes on. Rows are kept in float16, or in the
bytes of product quantisation; then similarities are computed again from the rows themselves.
"""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.settings import Index
from dinokit.curate.vectors import CHUNK, Vectors
from dinokit.runtime.files import atomic, write_text

Found = tuple[np.ndarray, np.ndarray]  # (q, k) float32 similarities, falling; (q, k) int64 rows, -1 for none
ITERATIONS = 10  # of the k-means that learns the lists, as faiss has it
_REFINE = 1 << 22  # numbers gathered at a time


def library() -> Any:
    """The module faiss.

    Raises:
        ValueError: if it is not installed, or broken by two of its packages.
    """
    extra = "-e '.[cpu]' in the clone, or -e '.[gpu]' on Linux with CUDA"
    try:
        faiss = import_module("faiss")
    except ModuleNotFoundError:
        raise ValueError(
            f"Curation needs faiss, which is not installed: pip install {extra}; never both, "
            f"as the two own the same folder."
        ) from None
    if not hasattr(faiss, "IndexFlatIP"):
        raise ValueError(
            f"faiss is installed, but empty: two of its packages were there, and one is gone. Remove both, "
            f"then: pip install {extra}."
        )
    return faiss


def exact(queries: np.ndarray, vectors: Vectors, k: int, gpu: bool) -> Found:
    """The k most similar rows of `vectors` to each of `queries` (q, D), by comparing all; ties: lower row."""
    found = _nothing(len(queries), k)
    for start, x in vectors.chunks():
        similarity, rows = _knn(queries, x, min(k, len(x)), gpu, inner=True)
        found = _merged(found, (similarity, rows + start), k)
    return found


def assign(x: np.ndarray, centres: np.ndarray, gpu: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each row of x (m, D) the nearest of centres (c, D): its number (m,), and the squared distance.

    Holds m * c numbers. Of equally near centres, the first.
    """
    if gpu and _gpus():
        distance, which = _knn(x, centres, 1, gpu, inner=False)
        return which[:, 0], np.maximum(distance[:, 0], 0)
    table = x @ centres.T  # several times as fast as faiss.knn, for one neighbour
    length = np.einsum("cd,cd->c", centres, centres)
    table *= -2
    table += length
    which = table.argmin(axis=1)
    near = table[np.arange(len(x)), which] + np.einsum("md,md->m", x, x)
    return which, np.maximum(near, 0)


def build(
    vectors: Vectors,
    folder: Path,
    cfg: Index,
    seed: int,
    trained: Path | None = None,
) -> "Searcher":
    """Make an index of `vectors` in `folder`, or finish it.

    Args:
        vectors: what is searched.
        folder: where it lies.
        cfg: its kind.
        seed: of the samples that it is learnt from and measured on.
        trained: the folder of another index whose lists may be used, of rows like these.

    Raises:
        ValueError: without faiss, or for a `pq` that does not divide the width.
    """
    faiss = library()
    n, about = len(vectors), folder / "index.json"
    searcher = Searcher(vectors, folder, cfg)
    if n > cfg.exact_below and not about.exists():
        empty = folder / "trained.faiss"
        if trained is not None and (trained / "trained.faiss").exists():
            empty = trained / "trained.faiss"
        elif not empty.exists():
            _write(_trained(vectors, cfg, seed), empty)
        for number in range(searcher.shards):
            if not searcher.shard(number).exists():
                index = faiss.read_index(str(empty))
                stop = min((number + 1) * cfg.shard, n)
                for start in range(number * cfg.shard, stop, CHUNK):
                    index.add(vectors.chunk(start, min(CHUNK, stop - start)))
                _write(index, searcher.shard(number))
    if not about.exists():
        write_text(about, json.dumps({"rows": n, "width": vectors.width, "exact": searcher.exact}) + "\n")
    return searcher


class Searcher:
    """An index that was built, with the rows it was built from."""

    def __init__(self, vectors: Vectors, folder: Path, cfg: Index) -> None:
        self.vectors, self.folder, self.cfg = vectors, folder, cfg
        self.exact = len(vectors) <= cfg.exact_below
        self.shards = -(-len(vectors) // cfg.shard)
        if cfg.threads:
            library().omp_set_num_threads(cfg.threads)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05d}.faiss"

    def search(self, queries: np.ndarray, k: int) -> Found:
        """The k most similar rows to each of queries (q, D), unit rows in float32."""
        if self.exact:
            return exact(queries, self.vectors, k, self.cfg.gpu)
        found = _nothing(len(queries), k)
        for number in range(self.shards):
            similarity, rows = self._open(number).search(queries, k)
            rows = np.where(rows < 0, -1, rows + number * self.cfg.shard)
            if self.cfg.pq:
                similarity = self._refined(queries, rows)
            found = _merged(found, (similarity, rows), k)
        return found

    @property
    def kind(self) -> str:
        """In words."""
        if self.exact:
            return "exact"
        lists = lists_of(len(self.vectors), self.cfg)
        return f"{lists} lists, {self.cfg.probe} looked into, {self.shards} shard(s)"

    def _open(self, number: int) -> Any:
        faiss = library()
        gpu = self.cfg.gpu and _gpus()
        index = faiss.read_index(str(self.shard(number)), 0 if gpu else faiss.IO_FLAG_MMAP)
        index.nprobe = self.cfg.probe
        if gpu:
            return faiss.index_cpu_to_all_gpus(index)
        # Its own reading ahead costs 32 threads a query, and the pages are there after the first.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        return index

    def _refined(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        done = np.full(rows.shape, -np.inf, np.float32)
        step = max(_REFINE // (rows.shape[1] * queries.shape[1]), 1)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            x = self.vectors.take(np.maximum(part, 0).ravel()).reshape(*part.shape, -1)
            similarity = np.einsum("qd,qkd->qk", queries[start : start + step], x)
            done[start : start + step] = np.where(part < 0, -np.inf, similarity)
        return done


def lists_of(rows: int, cfg: Index) -> int:
    """The inverted lists of a shard: as set, or four times the square root of its rows."""
    rows = min(rows, cfg.shard)
    return min(cfg.lists or 4 * math.isqrt(rows), rows)


def _trained(vectors: Vectors, cfg: Index, seed: int) -> Any:
    if cfg.pq and vectors.width % cfg.pq:
        raise ValueError(f"index.pq={cfg.pq} does not divide the width of the embeddings, {vectors.width}.")
    faiss, lists = library(), lists_of(len(vectors), cfg)
    kind = f"IVF{lists},{f'PQ{cfg.pq}' if cfg.pq else 'SQfp16'}"
    index = faiss.index_factory(vectors.width, kind, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = ITERATIONS, seed + 1, cfg.train
    index.cp.min_points_per_centroid = 1  # faiss would print a warning below 39
    if cfg.gpu and _gpus():
        learner = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(vectors.width))
        index.clustering_index = learner  # faiss borrows it: the name keeps it alive
    count = min(len(vectors), max(cfg.train * lists, 1024))
    rows = np.random.default_rng([seed, 0]).choice(len(vectors), count, replace=False)
    index.train(vectors.take(np.sort(rows)))
    index.clustering_index = None
    return index


def _write(index: Any, path: Path) -> None:
    with atomic(path) as part:
        library().write_index(index, str(part))


def _gpus() -> int:
    return int(getattr(library(), "get_num_gpus", lambda: 0)())


def _knn(queries: np.ndarray, x: np.ndarray, k: int, gpu: bool, inner: bool) -> Found:
    faiss = library()
    metric = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
    if gpu and _gpus():
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, x, k, metric=metric)
    return faiss.knn(queries, x, k, metric=metric)


def _nothing(q: int, k: int) -> Found:
    return np.full((q, k), -np.inf, np.float32), np.full((q, k), -1, np.int64)


def _merged(a: Found, b: Found, k: int) -> Found:
    """The k best of two results; of equals, those of `a` come first."""
    similarity = np.concatenate([a[0], b[0]], axis=1)
    rows = np.concatenate([a[1], b[1]], axis=1)
    similarity[rows < 0] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)
