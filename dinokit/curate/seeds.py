"""The settings of one set of seeds, seeds.NAME in a recipe; besides these, it holds those of a source."""

from dataclasses import dataclass
from typing import Literal

from dinokit.config.registry import check_at_least


@dataclass
class Config:
    """How the set retrieves."""

    rule: Literal["sample", "cluster"] = "sample"
    keep: bool = False  # put the seeds themselves into the training set
    k: int = 4  # rule=sample: images a seed
    reserve: int = 4  # rule=sample: k * reserve candidates, for when others took them; 1: seeds share images
    # rule=sample: an image comes in only if it is more like its seed than this share of the seeds is like the
    # nearest other seed; 0: however unlike.
    strict: float = 0.0
    min_hits: int = 3  # rule=cluster: a cluster with more seeds than this gives images
    per_cluster: int = 10_000  # rule=cluster: images it gives at most
    cap: int = 1_000_000  # rule=cluster: images of all clusters together

    def __post_init__(self) -> None:
        check_at_least(self, k=1, reserve=1, strict=0, min_hits=0, per_cluster=1, cap=1)
        if self.strict > 1:
            raise ValueError(f"strict={self.strict}, but it is a share of the seeds, from 0 to 1.")
