"""What a curation takes: seconds, memory and disk, from the number of images.

    dinokit.curate.cost.cost(Work(1_000_000_000), measured("small")) -> {stage: Cost}

Disk and memory follow from the formats; seconds from the operations and from what a machine does a second,
which a curation of some thousand images measures. tests/curate/test_cost.py holds disk and memory to real
runs.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from dinokit.curate.choose import MOST_CLUSTERS, PICK
from dinokit.curate.dedup import EDGE, QUERIES
from dinokit.curate.hashing import RECORD
from dinokit.curate.index import ITERATIONS, lists_of
from dinokit.curate.settings import Clusters, Index
from dinokit.curate.vectors import CHUNK

INTERPRETER = 600 << 20  # bytes that Python, torch and faiss take before anything is done


@dataclass(frozen=True)
class Machine:
    """What is done a second; the defaults are for two cores of an AMD EPYC with AVX-512.

    Images a second depend on files and backbone: measured() has yours. The three rates below them are twice
    what a core did in a second of its own time, in runs of 50,000 to 1,000,000 vectors of width 384.
    """

    decoded: float = 700.0  # images decoded and hashed: JPEG files of 300 pixels, 20 KB
    embedded: float = 20.0  # images through the backbone: a ViT-S/16 at 224 pixels
    flops: float = 1.2e11  # of matrix products in float32
    scanned: float = 2.6e10  # bytes of inverted lists
    summed: float = 2.0e8  # numbers of rows that k-means reads and adds to its centres
    machines: int = 1  # that share the stages hash, embed, neighbours and search


@dataclass(frozen=True)
class Work:
    """What there is to do."""

    images: int
    width: int = 384
    left: float = 0.6  # share of the pool that is left after copies and evaluation images
    seeds: int = 0  # with rule=sample
    neighbours: int = 65  # of dedup, with the image itself
    candidates: int = 16  # of a seed: k times reserve
    edges: float = 1.0  # pairs of copies an image
    hashed: bool = True  # False: embeddings alone were given
    index: Index = field(default_factory=Index)
    clusters: Clusters = field(default_factory=Clusters)


@dataclass(frozen=True)
class Cost:
    """Of a stage."""

    seconds: float
    memory: float  # bytes at the peak, without the pages of mapped files
    disk: float  # bytes that it leaves


def measured(out: str | Path, machines: int = 1) -> Machine:
    """The machine that did a curation of images: its images a second, those of a run that was not stopped.

    Args:
        out: the curation's folder.
        machines: like it, that will share the work.

    Raises:
        ValueError: if it did not come to the end of `hash` and `embed`, or hashed and embedded no images.
    """
    rates = {}
    for stage in ("hash", "embed"):
        done = next(iter((Path(out) / "stages").glob(f"{stage}.*/done.json")), None)
        said = json.loads(done.read_text(encoding="utf-8"))["figures"] if done else {}
        if not said.get("computed"):
            raise ValueError(
                f"{out} holds no curation of images that came to the end of its stage '{stage}'."
            )
        rates[stage] = said["computed"] / max(said["seconds"], 0.01)
    return Machine(decoded=rates["hash"], embedded=rates["embed"], machines=machines)


def cost(work: Work, machine: Machine | None = None) -> dict[str, Cost]:
    """By stage, for those that matter."""
    on = machine or Machine()
    n, d = work.images, work.width
    row, left = 2 * d, int(n * work.left)
    chunk = 3 * CHUNK * d * 4
    hashing = Cost(n / on.decoded / on.machines, 3 * n * RECORD.itemsize, n * (RECORD.itemsize + 17))
    each = {
        "hash": hashing if work.hashed else Cost(0, 17 * n, 17 * n),
        "embed": Cost(
            n / on.embedded / on.machines if work.hashed else 0, chunk, n * (row * work.hashed + 8)
        ),
        "index": _index(work, n, on),
        "neighbours": Cost(
            _search(work, n, n, on) / on.machines,
            chunk + QUERIES * work.neighbours * 60,
            n * work.edges * EDGE.itemsize,
        ),
        "dedup": Cost(n * 5e-7, n * 60, 17 * n),
        "clusters": _clusters(work, left, on),
        "survivors": _index(work, left, on, learn=False) if work.seeds else Cost(0, 0, 0),
        "search": Cost(
            _search(work, work.seeds, left, on) / on.machines, chunk, work.seeds * work.candidates * 12
        ),
        "retrieve": Cost(
            left * 1e-6, left * PICK.itemsize + 2 * work.seeds * work.candidates * 12, left * PICK.itemsize
        ),
    }
    return {name: Cost(c.seconds, c.memory + INTERPRETER, c.disk) for name, c in each.items()}


def total(costs: dict[str, Cost]) -> Cost:
    """Of all stages: they follow each other, so of memory the most counts."""
    parts = list(costs.values())
    return Cost(sum(c.seconds for c in parts), max(c.memory for c in parts), sum(c.disk for c in parts))


def _index(work: Work, rows: int, on: Machine, learn: bool = True) -> Cost:
    """Learnt, or with the lists of another that was."""
    cfg, d = work.index, work.width
    if rows <= cfg.exact_below:
        return Cost(_exact(cfg.recall, rows, d, on), 3 * CHUNK * d * 4, 0)
    lists, code = lists_of(rows, cfg), cfg.pq or 2 * d
    learnt = min(rows, max(cfg.train * lists, 1024)) if learn else 0
    products = 2.0 * d * lists * (learnt * ITERATIONS + rows)
    shards = -(-rows // cfg.shard)
    size = min(rows, cfg.shard) * (code + 8)
    memory = max(2 * learnt * d * 4, 1.5 * size + 3 * CHUNK * d * 4)  # lists grow by halves
    disk = rows * (code + 8) + (shards + learn) * lists * d * 4
    return Cost(products / on.flops + _exact(cfg.recall, rows, d, on), memory, disk)


def _search(work: Work, queries: int, rows: int, on: Machine) -> float:
    cfg, d = work.index, work.width
    if rows <= cfg.exact_below:
        return _exact(queries, rows, d, on)
    lists, code = lists_of(rows, cfg), cfg.pq or 2 * d
    shards = -(-rows // cfg.shard)
    scanned = queries * rows * min(cfg.probe / lists, 1) * code
    return scanned / on.scanned + _exact(queries, lists * shards, d, on)


def _exact(queries: int, rows: int, d: int, on: Machine) -> float:
    return 2.0 * queries * rows * d / on.flops


def _clusters(work: Work, left: int, on: Machine) -> Cost:
    cfg = work.clusters
    k = min(cfg.count or min(math.isqrt(left), MOST_CLUSTERS), left)
    points = min(left, k * cfg.kmeans.points) if cfg.kmeans.points else left
    visits = points * cfg.kmeans.iterations + work.images
    seconds = _exact(visits, k, work.width, on) + visits * work.width / on.summed
    return Cost(seconds, 2 * k * work.width * 12 + 3 * CHUNK * work.width * 4, 8 * work.images)
