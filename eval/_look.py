"""What the dense evaluators share: opening pairs, and a frozen backbone to look through."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinokit.config import registry
from dinokit.data.dense import DenseSource
from dinokit.data.sources import ImageLike
from dinokit.features import Map, dense, device_of
from dinokit.models import Backbone


@dataclass(frozen=True)
class Look:
    """A frozen backbone, and what is taken of it."""

    backbone: Backbone
    blocks: list[int]
    norm: bool
    precision: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return device_of(self.backbone)

    def __call__(self, images: Tensor) -> list[Map]:
        """Images (b, C, H, W) -> a Map of each block."""
        return dense(self.backbone, images.to(self.device), self.blocks, self.norm, self.precision)


def open_pairs(
    section: Mapping[str, Any] | None, split: str, target: str, backbone: Backbone, most: int
) -> DenseSource:
    """The source `section`, with maps of `target`; at most `most` pairs of it, evenly spread; 0 means all.

    Raises:
        ValueError: if there is no section, its maps are of the other kind, or it is empty.
    """
    if not section or not section.get("name"):
        raise ValueError(f"{split}.name must be given; there is: {', '.join(registry.names('data.pairs'))}.")
    known = {"channels": backbone.channels, "target": target}
    has = {item.name for item in fields(registry.find("data.dense", section["name"]).Config)}
    section = {**section, **{key: value for key, value in known.items() if key in has}}
    pairs: DenseSource = registry.build("data.dense", section)
    if bool(pairs.classes) != (target == "mask"):
        have = "classes" if pairs.classes else "depths"
        wanted = "classes" if target == "mask" else "depths"
        raise ValueError(f"{split}.name={section['name']} gives maps of {have}; {wanted} are judged here.")
    if not len(pairs):
        raise ValueError(f"{split}.name={section['name']} has no image.")
    return _Few(pairs, most) if 0 < most < len(pairs) else pairs


class _Few:
    """Some pairs of a source: one drawn from each of so many equal parts, the same every time."""

    def __init__(self, pairs: DenseSource, count: int) -> None:
        n, draw = len(pairs), random.Random(0)
        self.pairs, self.classes = pairs, pairs.classes
        self.places = [draw.randrange(i * n // count, (i + 1) * n // count) for i in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[ImageLike, np.ndarray]:
        return self.pairs[self.places[index]]

    def name(self, index: int) -> str:
        return self.pairs.name(self.places[index])
