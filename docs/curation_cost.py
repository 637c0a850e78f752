"""Estimate the time, memory and disk of a curation from the number of images: the table in docs/curation.md.

    python docs/curation_cost.py IMAGES [CURATION [MACHINES]]

Disk and memory follow from the formats. Time follows from the operations and from the rates of a machine.
CURATION is the folder of a curation of some thousand images, which measures the images a second; MACHINES is
the number of such machines. tests/curate/test_cost.py compares disk and memory with real runs.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dinokit.curate.dedup import EDGE, QUERIES
from dinokit.curate.hashing import RECORD
from dinokit.curate.index import CHUNK, ITERATIONS, lists_of
from dinokit.curate.retrieve import MAX_CLUSTERS, SELECTED
from dinokit.curate.settings import Clusters, Index

INTERPRETER = 600 << 20  # bytes that Python, torch and faiss take when they are loaded


@dataclass(frozen=True)
class Machine:
    """Rates, each a second; the defaults are for two cores of an AMD EPYC with AVX-512.

    Images a second depend on files and backbone: measured_machine() measures yours. The three rates below
    them are twice those of one core, in runs of 50,000 to 1,000,000 vectors of width 384.
    """

    decoded: float = 700.0  # images decoded and hashed: JPEG files of 300 pixels, 20 KB
    embedded: float = 20.0  # images through the backbone: a ViT-S/16 at 224 pixels
    flops: float = 1.2e11  # of matrix products in float32
    scanned: float = 2.6e10  # bytes of inverted lists
    summed: float = 2.0e8  # numbers of rows that k-means reads and adds to its centres
    machines: int = 1  # that share the stages hash, embed, neighbours and search


@dataclass(frozen=True)
class Workload:
    """The size of a curation."""

    images: int
    width: int = 384
    left: float = 0.6  # share of the pool that is left without duplicates and evaluation images
    seeds: int = 0  # with rule=sample
    neighbours: int = 65  # of dedup, with the image itself
    candidates: int = 16  # of a seed: k times reserve
    edges: float = 1.0  # pairs of duplicates an image
    hashed: bool = True  # False: embeddings alone were given
    index: Index = field(default_factory=Index)
    clusters: Clusters = field(default_factory=Clusters)


@dataclass(frozen=True)
class Cost:
    """The cost of a stage."""

    seconds: float
    memory: float  # bytes at the peak, without the pages of mapped files
    disk: float  # bytes of its files


def measured_machine(out: str | Path, machines: int = 1) -> Machine:
    """The machine that ran a curation: its images a second. The run must not have been stopped in between.

    Args:
        out: the curation's folder.
        machines: such machines that will share the work.

    Raises:
        ValueError: if the stages `hash` and `embed` are not finished, or had no images.
    """
    rates = {}
    for stage in ("hash", "embed"):
        marker = next(iter((Path(out) / "stages").glob(f"{stage}.*/done.json")), None)
        figures = json.loads(marker.read_text(encoding="utf-8"))["figures"] if marker else {}
        if not figures.get("computed"):
            raise ValueError(f"{out} has no curation of images that finished its stage '{stage}'.")
        rates[stage] = figures["computed"] / max(figures["seconds"], 0.01)
    return Machine(decoded=rates["hash"], embedded=rates["embed"], machines=machines)


def estimate(work: Workload, machine: Machine | None = None) -> dict[str, Cost]:
    """The cost of each stage, without those that cost little."""
    on = machine or Machine()
    n, d = work.images, work.width
    row, left = 2 * d, int(n * work.left)
    chunk = 3 * CHUNK * d * 4
    hashing = Cost(n / on.decoded / on.machines, 3 * n * RECORD.itemsize, n * (RECORD.itemsize + 17))
    stages = {
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
        "clean_index": _index(work, left, on, learn=False) if work.seeds else Cost(0, 0, 0),
        "search": Cost(
            _search(work, work.seeds, left, on) / on.machines, chunk, work.seeds * work.candidates * 12
        ),
        "retrieve": Cost(
            left * 1e-6,
            left * SELECTED.itemsize + 2 * work.seeds * work.candidates * 12,
            left * SELECTED.itemsize,
        ),
    }
    return {name: Cost(c.seconds, c.memory + INTERPRETER, c.disk) for name, c in stages.items()}


def total(costs: dict[str, Cost]) -> Cost:
    """The cost of all stages. They run one after the other, so their memory is the largest of a stage."""
    stages = list(costs.values())
    return Cost(sum(c.seconds for c in stages), max(c.memory for c in stages), sum(c.disk for c in stages))


def _index(work: Workload, rows: int, on: Machine, learn: bool = True) -> Cost:
    """Of an index; without `learn`, with the lists of another one."""
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


def _search(work: Workload, queries: int, rows: int, on: Machine) -> float:
    cfg, d = work.index, work.width
    if rows <= cfg.exact_below:
        return _exact(queries, rows, d, on)
    lists, code = lists_of(rows, cfg), cfg.pq or 2 * d
    shards = -(-rows // cfg.shard)
    scanned = queries * rows * min(cfg.probe / lists, 1) * code
    return scanned / on.scanned + _exact(queries, lists * shards, d, on)


def _exact(queries: int, rows: int, d: int, on: Machine) -> float:
    return 2.0 * queries * rows * d / on.flops


def _clusters(work: Workload, left: int, on: Machine) -> Cost:
    cfg = work.clusters
    k = min(cfg.count or min(math.isqrt(left), MAX_CLUSTERS), left)
    points = min(left, k * cfg.kmeans.points) if cfg.kmeans.points else left
    visits = points * cfg.kmeans.iterations + work.images
    seconds = _exact(visits, k, work.width, on) + visits * work.width / on.summed
    return Cost(seconds, 2 * k * work.width * 12 + 3 * CHUNK * work.width * 4, 8 * work.images)


if __name__ == "__main__":
    images, *measured = sys.argv[1:]
    on = measured_machine(measured[0], *map(int, measured[1:])) if measured else None
    costs = estimate(Workload(int(float(images))), on)
    for name, cost in {**costs, "total": total(costs)}.items():
        print(
            f"{name:<12}{cost.seconds / 3600:14,.2f} h{cost.memory / 2**30:10,.1f} GiB in memory"
            f"{cost.disk / 2**30:10,.1f} GiB on disk"
        )
