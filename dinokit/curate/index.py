"""Vectors on disk, nearest-neighbour search in them with faiss, and its measured recall.

Up to `exact_below` rows every pair is compared. Above, an inverted file is learnt from a sample and lies on
disk in shards, which a search maps into memory one after the other:

    FOLDER/index.json  rows and width     trained.faiss  lists without rows     00000.faiss ...

Rows are stored in float16, or in the bytes of product quantisation; in that case similarities are computed
again from the rows themselves.
"""

import json
import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.settings import WHOLE, Index, Share
from dinokit.runtime.files import atomic, write_text

CHUNK = 65_536  # rows at a time: 100 MB of width 384
# (q, k) float32 similarities, descending; (q, k) int64 rows, -1: none
Neighbours = tuple[np.ndarray, np.ndarray]
ITERATIONS = 10  # of the k-means that learns the lists: faiss' default
RECALL_FILE = "recall.npz"
_REFINE = 1 << 22  # numbers gathered at a time


def save(path: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> None:
    """Write one array to a .npy file, or named arrays to an .npz file, atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        if array is not None:
            np.save(file, array)
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes them for allow_pickle


def shard_files(
    folder: Path, rows: int, size: int, ending: str = "npy", share: Share = WHOLE
) -> Iterator[tuple[Path, int]]:
    """For each shard of the share: its file, and its first row; a shard has `size` of the rows."""
    for number in range(share.number, -(-rows // size), share.of):
        yield folder / f"{number:05d}.{ending}", number * size


class Vectors:
    """Rows (n, D) of .npy files or arrays laid end to end, or a selection of these rows.

    Args:
        arrays: each (m, D), of any float type; files are memory-mapped when they are read.
        rows: the selected rows, ascending; None: all.
        unit: whether to put each row on the unit sphere.

    Raises:
        ValueError: if the arrays are not of one width.
    """

    def __init__(
        self, arrays: Sequence[Path | np.ndarray], rows: np.ndarray | None = None, unit: bool = True
    ) -> None:
        self.arrays, self.rows, self.unit = list(arrays), rows, unit
        shapes = [_open(array).shape for array in self.arrays]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"Embeddings must be arrays (n, D) of one width; the shapes are: {shapes[:4]}.")
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        self.width = int(shapes[0][1])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.rows is None else len(self.rows)

    def select(self, rows: np.ndarray) -> "Vectors":
        """Only these rows, ascending, counted among the rows of this object."""
        return Vectors(self.arrays, rows if self.rows is None else self.rows[rows], self.unit)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D) float32, in the order asked for."""
        rows = np.asarray(rows) if self.rows is None else self.rows[rows]
        if len(self.arrays) == 1 and (rows[1:] >= rows[:-1]).all():
            return self._normalised(_open(self.arrays[0])[rows].astype(np.float32))
        result = np.empty((len(rows), self.width), np.float32)
        array_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(array_of):
            here = np.flatnonzero(array_of == number)
            inside = rows[here] - self._starts[number]
            order = np.argsort(inside, kind="stable")  # a file is read from its beginning to its end
            result[here[order]] = _open(self.arrays[number])[inside[order]]
        return self._normalised(result)

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        """The first row's number and (m, D) float32, for all rows in order."""
        for start in range(0, len(self), size):
            yield start, self.chunk(start, size)

    def chunk(self, start: int, size: int = CHUNK) -> np.ndarray:
        """(m, D) float32: the `size` rows from `start`, or as many as there are."""
        return self.take(np.arange(start, min(start + size, len(self))))

    def without_direction(self) -> np.ndarray:
        """(n,) bool: rows that are not finite, or zero."""
        raw = Vectors(self.arrays, self.rows, unit=False)
        result = np.zeros(len(self), np.bool_)
        for start, x in raw.chunks():
            length = np.einsum("ij,ij->i", x, x)
            result[start : start + len(x)] = ~np.isfinite(length) | (length == 0)
        return result

    def _normalised(self, x: np.ndarray) -> np.ndarray:
        if self.unit:
            with np.errstate(invalid="ignore", over="ignore"):  # rows of without_direction()
                length = np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
                x /= np.where(length > 0, length, 1)
        return x


def _open(array: Path | np.ndarray) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.load(array, mmap_mode="r")


def import_faiss() -> Any:
    """The module faiss.

    Raises:
        ValueError: if it is not installed, or broken because two of its packages were installed.
    """
    extra = "'.[cpu]' in the clone, or '.[gpu]' on Linux with CUDA"
    try:
        faiss = import_module("faiss")
    except ModuleNotFoundError:
        raise ValueError(
            f"Curation needs faiss, which is not installed: pip install {extra}. Never install both: their "
            f"files overwrite each other."
        ) from None
    if not hasattr(faiss, "IndexFlatIP"):
        raise ValueError(
            f"faiss is installed, but empty: one of its two packages was removed, and its files with it. "
            f"Uninstall both, then: pip install {extra}."
        )
    return faiss


def exact_search(queries: np.ndarray, vectors: Vectors, k: int, gpu: bool) -> Neighbours:
    """The k most similar rows of `vectors` to each of `queries` (q, D); of equal rows, the first."""
    found = _no_neighbours(len(queries), k)
    for start, x in vectors.chunks():
        similarity, rows = _knn(queries, x, min(k, len(x)), gpu, inner=True)
        found = _merge(found, (similarity, rows + start), k)
    return found


def nearest_centre(x: np.ndarray, centres: np.ndarray, gpu: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each row of x (m, D) the nearest of centres (c, D): its number (m,), and the squared distance (m,).

    Needs memory for m * c numbers. Of equally near centres, the first.
    """
    if gpu and _gpu_count():
        distance, centre = _knn(x, centres, 1, gpu, inner=False)
        return centre[:, 0], np.maximum(distance[:, 0], 0)
    table = x @ centres.T  # for one neighbour, several times as fast as faiss.knn
    length = np.einsum("cd,cd->c", centres, centres)
    table *= -2
    table += length
    centre = table.argmin(axis=1)
    distance = table[np.arange(len(x)), centre] + np.einsum("md,md->m", x, x)
    return centre, np.maximum(distance, 0)


def build_index(
    vectors: Vectors, folder: Path, cfg: Index, seed: int, trained: Path | None = None
) -> "Searcher":
    """Write an index of `vectors` to `folder`; files that are there are not computed again.

    Args:
        vectors: the rows to search.
        folder: of the index.
        cfg: its settings.
        seed: of the sample that it is learnt from.
        trained: the folder of another index of similar rows, whose lists may be used.

    Raises:
        ValueError: without faiss, or for a `pq` that does not divide the width.
    """
    faiss = import_faiss()
    n, description = len(vectors), folder / "index.json"
    searcher = Searcher(vectors, folder, cfg)
    if description.exists():
        return searcher
    if not searcher.exact:
        empty = folder / "trained.faiss"
        if trained is not None and (trained / "trained.faiss").exists():
            empty = trained / "trained.faiss"
        elif not empty.exists():
            _write(_train(vectors, cfg, seed), empty)
        for path, first in shard_files(folder, n, cfg.shard, "faiss"):
            if not path.exists():
                index = faiss.read_index(str(empty))
                stop = min(first + cfg.shard, n)
                for start in range(first, stop, CHUNK):
                    index.add(vectors.chunk(start, min(CHUNK, stop - start)))
                _write(index, path)
    values = {"rows": n, "width": vectors.width, "exact": searcher.exact}
    write_text(description, json.dumps(values) + "\n")
    return searcher


class Searcher:
    """Searches an index that build_index() wrote."""

    def __init__(self, vectors: Vectors, folder: Path, cfg: Index) -> None:
        self.vectors, self.folder, self.cfg = vectors, folder, cfg
        self.exact = len(vectors) <= cfg.exact_below
        if cfg.threads:
            import_faiss().omp_set_num_threads(cfg.threads)

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """The k most similar rows to each of queries (q, D): unit rows in float32."""
        if self.exact:
            return exact_search(queries, self.vectors, k, self.cfg.gpu)
        found = _no_neighbours(len(queries), k)
        for path, first in shard_files(self.folder, len(self.vectors), self.cfg.shard, "faiss"):
            similarity, rows = self._open(path).search(queries, k)
            rows = np.where(rows < 0, -1, rows + first)
            if self.cfg.pq:
                similarity = self._refine(queries, rows)
            found = _merge(found, (similarity, rows), k)
        return found

    @property
    def kind(self) -> str:
        """A description in words."""
        if self.exact:
            return "exact"
        lists, shards = lists_of(len(self.vectors), self.cfg), -(-len(self.vectors) // self.cfg.shard)
        return f"{lists} lists, {self.cfg.probe} searched, {shards} shard(s)"

    def _open(self, path: Path) -> Any:
        faiss = import_faiss()
        gpu = self.cfg.gpu and _gpu_count()
        index = faiss.read_index(str(path), 0 if gpu else faiss.IO_FLAG_MMAP)
        index.nprobe = self.cfg.probe
        if gpu:
            return faiss.index_cpu_to_all_gpus(index)
        # faiss would start 32 threads a query to read ahead; after the first query all pages are in memory.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        return index

    def _refine(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(q, k) exact similarities of the rows found, in place of quantised ones."""
        result = np.full(rows.shape, -np.inf, np.float32)
        step = max(_REFINE // (rows.shape[1] * queries.shape[1]), 1)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            x = self.vectors.take(np.maximum(some, 0).ravel()).reshape(*some.shape, -1)
            similarity = np.einsum("qd,qkd->qk", queries[start : start + step], x)
            result[start : start + step] = np.where(some < 0, -np.inf, similarity)
        return result


def measure_recall(
    searcher: Searcher, k: int, seed: int, folder: Path, queries_from: Vectors | None = None
) -> dict[str, Any]:
    """Search a sample of `index.recall` queries also exactly, and compare.

    Writes recall.npz, unless the index is exact itself: similarity (s, k) of the rows that exact search
    finds, and found (s, k) bool, whether the index finds them too.

    Args:
        searcher: the index.
        k: neighbours searched.
        seed: of the sample.
        folder: of recall.npz.
        queries_from: the queries are drawn from these; None: from the rows of the index.

    Returns:
        kind: a description of the index; recall: the share found.
    """
    if searcher.exact:
        return {"kind": searcher.kind}
    queries_from = searcher.vectors if queries_from is None else queries_from
    k, rng = min(k, len(searcher.vectors)), np.random.default_rng([seed, 1])
    rows = np.sort(rng.choice(len(queries_from), min(searcher.cfg.recall, len(queries_from)), replace=False))
    queries = queries_from.take(rows)
    similarity, expected = exact_search(queries, searcher.vectors, k, searcher.cfg.gpu)
    _, approximate = searcher.search(queries, k)
    found = np.stack([np.isin(e, a) for e, a in zip(expected, approximate, strict=True)])
    if queries_from is searcher.vectors:
        similarity[expected == rows[:, None]] = -np.inf  # every row finds itself: no pair
    save(folder / RECALL_FILE, similarity=similarity, found=found)
    return {"kind": searcher.kind, "recall": round(float(found.mean()), 4)}


def recall_of_pairs(folder: Path, threshold: float) -> dict[str, Any]:
    """The recall of neighbours with a similarity above `threshold`, and how many of them the sample has.

    Empty for an exact index; without the recall if the sample has no such pairs.
    """
    if not (folder / RECALL_FILE).exists():
        return {}
    with np.load(folder / RECALL_FILE) as arrays:
        found = arrays["found"][arrays["similarity"] > threshold]
    recall = {"recall_of_pairs": round(float(found.mean()), 4)} if len(found) else {}
    return {**recall, "pairs_in_the_sample": len(found)}


def lists_of(rows: int, cfg: Index) -> int:
    """The inverted lists of a shard: as set, or four times the square root of its rows."""
    rows = min(rows, cfg.shard)
    return min(cfg.lists or 4 * math.isqrt(rows), rows)


def _train(vectors: Vectors, cfg: Index, seed: int) -> Any:
    if cfg.pq and vectors.width % cfg.pq:
        raise ValueError(f"index.pq={cfg.pq} does not divide the width of the embeddings, {vectors.width}.")
    faiss, lists = import_faiss(), lists_of(len(vectors), cfg)
    kind = f"IVF{lists},{f'PQ{cfg.pq}' if cfg.pq else 'SQfp16'}"
    index = faiss.index_factory(vectors.width, kind, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = ITERATIONS, seed + 1, cfg.train
    index.cp.min_points_per_centroid = 1  # below 39 faiss would print a warning
    if cfg.gpu and _gpu_count():
        learner = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(vectors.width))
        index.clustering_index = learner  # faiss does not own it: the local name keeps it alive
    count = min(len(vectors), max(cfg.train * lists, 1024))
    rows = np.random.default_rng([seed, 0]).choice(len(vectors), count, replace=False)
    index.train(vectors.take(np.sort(rows)))
    index.clustering_index = None
    return index


def _write(index: Any, path: Path) -> None:
    with atomic(path) as temporary:
        import_faiss().write_index(index, str(temporary))


def _gpu_count() -> int:
    return int(getattr(import_faiss(), "get_num_gpus", lambda: 0)())


def _knn(queries: np.ndarray, x: np.ndarray, k: int, gpu: bool, inner: bool) -> Neighbours:
    faiss = import_faiss()
    metric = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
    if gpu and _gpu_count():
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, x, k, metric=metric)
    return faiss.knn(queries, x, k, metric=metric)


def _no_neighbours(q: int, k: int) -> Neighbours:
    return np.full((q, k), -np.inf, np.float32), np.full((q, k), -1, np.int64)


def _merge(a: Neighbours, b: Neighbours, k: int) -> Neighbours:
    """The k nearest of two results; of equal similarities, those of `a` come first."""
    similarity = np.concatenate([a[0], b[0]], axis=1)
    rows = np.concatenate([a[1], b[1]], axis=1)
    similarity[rows < 0] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)
