"""The settings of a curation: what a recipe configs/curate_*.yaml holds.

The defaults are those of DINOv2 (arXiv 2304.07193, section 3 and appendix A) where it states one.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.config.registry import check_at_least

STAGES = (
    "hash", "embed", "index", "neighbours", "dedup", "overlap", "clusters", "survivors", "search", "retrieve",
    "manifest", "report",
)  # fmt: skip
SHARED = ("hash", "embed", "neighbours", "search")  # stages that several machines may share


@dataclass
class Embed:
    """How images are embedded, where their embeddings are not given."""

    token: Literal["cls", "mean"] = "cls"
    size: int = 0  # pixels of the crop; 0: as the backbone was trained
    batch: int = 64  # images at a time
    workers: int = -1  # processes that load images; -1: one a core but one
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(self, size=0, batch=1, workers=-1)


@dataclass
class Hash:
    """Copies that are found without an embedding."""

    bits: int = 12  # of 255 that may differ between near-exact copies; -1 leaves the whole pass out
    processes: int = 1  # that decode and hash

    def __post_init__(self) -> None:
        check_at_least(self, bits=-1, processes=1)


@dataclass
class Dedup:
    """Copies within the pool, and of evaluation images in it."""

    weights: str = ""  # of a copy-detection backbone; empty: those that retrieve
    k: int = 64  # neighbours looked at
    similarity: float = 0.6  # above it, two images of the pool are copies
    keep: Literal["first", "largest"] = "first"  # of a group: the first, or the one with most pixels
    against: float = 0.45  # above it, an image of the pool shows an evaluation image

    def __post_init__(self) -> None:
        check_at_least(self, k=1, similarity=-1, against=-1)


@dataclass
class Index:
    """Nearest-neighbour search over the pool."""

    exact_below: int = 100_000  # rows up to which every pair is compared
    lists: int = 0  # inverted lists of a shard; 0: four times the square root of its rows
    probe: int = 32  # lists looked into
    pq: int = 0  # bytes of product quantisation a row; 0: float16
    train: int = 64  # rows a list that the lists are learnt from
    shard: int = 2_000_000  # rows of one file
    recall: int = 1000  # queries that are also searched exactly, to measure the recall
    threads: int = 0  # 0: OMP_NUM_THREADS, or as many as there are cores
    gpu: bool = True  # use the GPUs that faiss sees

    def __post_init__(self) -> None:
        least = {"exact_below": 0, "lists": 0, "probe": 1, "pq": 0, "train": 1, "shard": 1, "recall": 1}
        check_at_least(self, **least, threads=0)


@dataclass
class KMeans:
    """Lloyd's algorithm from k-means++ centres."""

    iterations: int = 50
    points: int = 256  # rows a cluster that the centres are learnt from; 0: all
    plus_plus: int = 5_000  # clusters up to which k-means++ draws the first centres; above, plain chance does

    def __post_init__(self) -> None:
        check_at_least(self, iterations=0, points=0, plus_plus=0)


@dataclass
class Clusters:
    """The clusters of the pool that seeds with rule=cluster hit."""

    count: int = 0  # 0: the square root of the images, at most the published 100,000
    kmeans: KMeans = field(default_factory=KMeans)

    def __post_init__(self) -> None:
        check_at_least(self, count=0)


@dataclass
class Balance:
    """Images drawn evenly over the pool's clusters of clusters (Vo et al. 2024, arXiv 2405.15613)."""

    images: int = 0  # 0: none are drawn
    levels: tuple[int, ...] = (1000, 300)  # clusters, from the finest level up
    resample: tuple[int, ...] = (1, 10)  # times that each level is flattened
    nearest: tuple[int, ...] = (15, 2)  # members a cluster that a flattened level is learnt from
    draw: Literal["random", "central"] = "random"  # within a cluster of the finest level
    kmeans: KMeans = field(default_factory=KMeans)

    def __post_init__(self) -> None:
        check_at_least(self, images=0, levels=1, resample=0, nearest=1)
        if not len(self.levels) == len(self.resample) == len(self.nearest):
            raise ValueError(
                f"balance: levels, resample and nearest say {len(self.levels)}, {len(self.resample)} and "
                f"{len(self.nearest)} levels; they must say the same number."
            )
        if list(self.levels) != sorted(self.levels, reverse=True):
            raise ValueError(
                f"balance.levels={list(self.levels)}: each level has fewer clusters than the last."
            )


@dataclass
class Config:
    """A whole curation."""

    out: str = "???"
    weights: str = ""  # whatever load_backbone() reads; not needed where all embeddings are given
    pool: dict[str, Any] = field(default_factory=dict)  # a source, or `embeddings`, or both
    seeds: dict[str, Any] = field(default_factory=dict)  # by name: likewise, and the keys of Seeds
    against: dict[str, Any] = field(default_factory=dict)  # by name: likewise; what must not be in the set
    embed: Embed = field(default_factory=Embed)
    hash: Hash = field(default_factory=Hash)
    dedup: Dedup = field(default_factory=Dedup)
    index: Index = field(default_factory=Index)
    clusters: Clusters = field(default_factory=Clusters)
    balance: Balance = field(default_factory=Balance)
    seed: int = 0  # of everything random
    gallery: int = 12  # groups, clusters and queries that the report shows
