"""Settings of a curation: the content of a recipe configs/curate_*.yaml.

The defaults are those of DINOv2 (arXiv 2304.07193, section 3 and appendix A) where it states one.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.config.registry import check_at_least

STAGES = (
    "hash", "embed", "index", "neighbours", "dedup", "overlap", "clusters", "clean_index", "search",
    "retrieve", "manifest", "report",
)  # fmt: skip
SHARED = ("hash", "embed", "neighbours", "search")  # stages that several machines may share
OLD_STAGES = {"survivors": "clean_index"}  # earlier names, which stage= still accepts

FIT = 200, 50  # clusters of the two levels of a pool that is large enough

# By section: the least value of each number, or of each number in a list.
LEAST = {
    "embed": {"size": 0, "batch": 1, "workers": -1},
    "hash": {"bits": -1, "processes": 1},
    "dedup": {"k": 1, "similarity": -1, "against": -1},
    "index": {
        "exact_below": 0, "lists": 0, "probe": 1, "pq": 0, "train": 1, "shard": 1, "recall": 1, "threads": 0,
    },
    "clusters": {"count": 0},
    "balance": {"images": 0, "levels": 1, "resample": 0, "nearest": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Share:
    """The share of a stage that this process computes: its shards number, number + of, number + 2 of, ..."""

    number: int = 0
    of: int = 1


WHOLE = Share()


@dataclass
class Embed:
    """How images are embedded if no embeddings are given."""

    token: Literal["cls", "mean"] = "cls"
    size: int = 0  # pixels of the crop; 0: as the backbone was trained
    batch: int = 64  # images at a time
    workers: int = -1  # processes that load images; -1: one less than there are cores
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one


@dataclass
class Hash:
    """Duplicates that are found without embeddings."""

    bits: int = 12  # of 255 that may differ between near duplicates; -1: no hashing at all
    processes: int = 1  # that decode and hash


@dataclass
class Dedup:
    """Duplicates within the pool, and images of the pool that show an evaluation image."""

    weights: str = ""  # of a copy-detection backbone; empty: the same weights as for retrieval
    k: int = 64  # neighbours searched
    similarity: float = 0.6  # two images of the pool above it are duplicates
    keep: Literal["first", "largest"] = "first"  # of a group: the first image, or the one with most pixels
    against: float = 0.45  # an image of the pool above it shows an evaluation image


@dataclass
class Index:
    """Nearest-neighbour search over the pool."""

    exact_below: int = 100_000  # rows up to which every pair is compared
    lists: int = 0  # inverted lists of a shard; 0: four times the square root of its rows
    probe: int = 32  # lists searched
    pq: int = 0  # bytes of product quantisation a row; 0: float16
    train: int = 64  # rows a list that the lists are learnt from
    shard: int = 2_000_000  # rows of one file
    recall: int = 1000  # queries that are also searched exactly, to measure the recall
    threads: int = 0  # 0: OMP_NUM_THREADS, or the number of cores
    gpu: bool = True  # use the GPUs that faiss sees


@dataclass
class KMeans:
    """Lloyd's algorithm, started from k-means++."""

    iterations: int = 50
    points: int = 256  # rows a cluster that the centres are learnt from; 0: all
    plus_plus: int = 5_000  # clusters up to which k-means++ draws the first centres; above, they are random


@dataclass
class Clusters:
    """Clusters of the pool, for seeds with rule=cluster."""

    count: int = 0  # 0: the square root of the number of images, at most the published 100,000
    kmeans: KMeans = field(default_factory=KMeans)


@dataclass
class Balance:
    """Images drawn evenly over hierarchical clusters of the pool (Vo et al. 2024, arXiv 2405.15613)."""

    images: int = 0  # 0: none are drawn
    levels: tuple[int, ...] = ()  # clusters, from the finest level up; empty: two levels that fit the images
    resample: tuple[int, ...] = (1, 10)  # resampling steps of each level
    nearest: tuple[int, ...] = (15, 2)  # members a cluster that a resampling step learns from
    draw: Literal["random", "central"] = "random"  # within a cluster of the finest level
    kmeans: KMeans = field(default_factory=KMeans)

    def __post_init__(self) -> None:
        levels = len(self.levels) or len(FIT)
        if not levels == len(self.resample) == len(self.nearest):
            raise ValueError(
                f"balance.levels, .resample and .nearest have {levels}, {len(self.resample)} and "
                f"{len(self.nearest)} values, but each needs one value a level."
            )
        if list(self.levels) != sorted(self.levels, reverse=True):
            raise ValueError(
                f"balance.levels={list(self.levels)}: each level must have fewer clusters than the last."
            )

    def levels_of(self, images: int) -> tuple[int, ...]:
        """The clusters of each level; if none are given, a fifth of the images and a quarter of that, or FIT.

        Raises:
            ValueError: if there are more clusters than images.
        """
        if not self.levels:
            first = max(min(FIT[0], images // 5), 1)
            return first, max(min(FIT[1], first // 4), 1)
        if self.levels[0] > images:
            raise ValueError(
                f"balance.levels={list(self.levels)}: {self.levels[0]} clusters of {images} images. "
                f"Give fewer, such as balance.levels={images // 5 or 1},{images // 20 or 1}, or leave it out."
            )
        return self.levels


@dataclass
class Seeds:
    """How one set of seeds retrieves: seeds.NAME in a recipe, which also has the keys of a source."""

    rule: Literal["sample", "cluster"] = "sample"
    keep: bool = False  # put the seeds themselves into the training set
    k: int = 4  # rule=sample: images a seed
    # rule=sample: a seed has k * reserve candidates, for when other seeds took some; 1: seeds share images
    reserve: int = 4
    # rule=sample: an image is taken only if it is more similar to its seed than this share of the seeds is to
    # the nearest other seed; 0: no such limit.
    strict: float = 0.0
    min_hits: int = 3  # rule=cluster: a cluster with more seeds than this gives images
    per_cluster: int = 10_000  # rule=cluster: images of a cluster at most
    cap: int = 1_000_000  # rule=cluster: images of all clusters together

    def __post_init__(self) -> None:
        check_at_least(self, k=1, reserve=1, strict=0, min_hits=0, per_cluster=1, cap=1)
        if self.strict > 1:
            raise ValueError(f"strict={self.strict}, but it is a share of the seeds, from 0 to 1.")


@dataclass
class Config:
    """A whole curation."""

    out: str = "???"  # the folder of the curation
    weights: str = ""  # whatever load_backbone() reads; not needed if all embeddings are given
    pool: dict[str, Any] = field(default_factory=dict)  # a source, or `embeddings`, or both
    seeds: dict[str, Any] = field(default_factory=dict)  # by name: likewise, and the keys of Seeds
    against: dict[str, Any] = field(default_factory=dict)  # by name: likewise; evaluation images to exclude
    embed: Embed = field(default_factory=Embed)
    hash: Hash = field(default_factory=Hash)
    dedup: Dedup = field(default_factory=Dedup)
    index: Index = field(default_factory=Index)
    clusters: Clusters = field(default_factory=Clusters)
    balance: Balance = field(default_factory=Balance)
    seed: int = 0  # of all random numbers
    gallery: int = 12  # groups, clusters and queries that the report shows

    def __post_init__(self) -> None:
        for section, least in LEAST.items():
            check_at_least(getattr(self, section), **least)
        for kmeans in (self.clusters.kmeans, self.balance.kmeans):
            check_at_least(kmeans, iterations=0, points=0, plus_plus=0)
