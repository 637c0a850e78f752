"""Correspondence of keypoints between two images by the most similar patch, without training.

The feature of a point in the first image, interpolated between patches, is compared with every patch of the
second by cosine; the answer is the middle of the nearest patch. PCK@0.1 is the share of points that are found
within 0.1 of the longer side of the object's box in the second image, as on SPair-71k (arXiv 1908.10543,
section 5). Features are the patches of the last block.

    n  points     D  width     h, w  patches down and across
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config import registry
from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.pairs import Pair, PairSource
from dinokit.data.transforms import size_of
from dinokit.eval._dense import DenseBackbone
from dinokit.eval._patches import patches_of
from dinokit.features import frozen, last_blocks, spread_places
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.pairs", "test", labels=False)
    # same: the answer is the same place of the second image, a baseline
    method: Literal["nearest", "same"] = "nearest"
    alpha: tuple[float, ...] = (0.1,)  # of the box's longer side: distance up to which a point is found
    resize: int = only_if(0, method=("nearest",))  # pixels of the shorter side; 0: as stored
    max_test: int = 0  # pairs, drawn evenly from the set; 0: all
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training

    def __post_init__(self) -> None:
        check_at_least(self, resize=0, max_test=0)
        if not self.alpha or min(self.alpha) <= 0:
            raise ValueError(f"alpha={list(self.alpha)}: give one number or more, all above 0.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Find the points of each pair's first image in its second.

    Returns:
        For each alpha 'PCK@0.1', over all points, and 'PCK@0.1 by pair', the mean of the pairs' shares; of
        method=nearest 'ceiling@0.1', the share of points that have the middle of any patch so near: no
        feature finds more at this size. 'points'; 'pairs', those with a point.

    Raises:
        ValueError, LookupError: if the pairs do not fit, or have no point; the message names the key to set.
    """
    source = open_pairs(cfg.test, backbone)
    numbers = spread_places(len(source), cfg.max_test)[rank() :: world_size()]
    dense = None
    if cfg.method == "nearest":
        dense = DenseBackbone(backbone, last_blocks(backbone, 1), cfg.precision)
    reach = np.array(cfg.alpha)[:, None]
    sums = np.zeros((3, len(reach)))  # found points, shares of pairs, points that could be found
    points = pairs = 0
    with frozen(backbone):
        for index in watch(numbers, len(numbers), "test pairs"):
            pair = source[index]
            if not len(pair.sides):
                continue
            answers, best = same_place(pair) if dense is None else matched(cfg, dense, pair)
            found, possible = (
                np.linalg.norm(places - pair.points[1], axis=1) <= reach * pair.sides
                for places in (answers, best)
            )
            sums += np.stack([found.sum(axis=1), found.mean(axis=1), possible.sum(axis=1)])
            points, pairs = points + len(pair.sides), pairs + 1
    together = all_reduce_sum(torch.tensor([*sums.ravel(), points, pairs], dtype=torch.float64)).tolist()
    return _named(cfg, np.array(together[:-2]).reshape(sums.shape), int(together[-2]), int(together[-1]))


def _named(cfg: Config, sums: np.ndarray, points: int, pairs: int) -> dict[str, float]:
    """The scores, from sums (3, alphas) over all processes."""
    if not pairs:
        raise ValueError(f"The pairs ({(cfg.test or {})['name']}) have no point in both images.")
    scores: dict[str, float] = {}
    for alpha, (found, shares, possible) in zip(cfg.alpha, sums.T.tolist(), strict=True):
        scores |= {f"PCK@{alpha:g}": found / points, f"PCK@{alpha:g} by pair": shares / pairs}
        if cfg.method == "nearest":
            scores[f"ceiling@{alpha:g}"] = possible / points
    return {**scores, "points": points, "pairs": pairs}


def open_pairs(section: Mapping[str, Any] | None, backbone: Backbone) -> PairSource:
    """The source of the section `test`, in the backbone's channels.

    Raises:
        ValueError: if there is no section.
    """
    if not section or not section.get("name"):
        raise ValueError(f"test.name must be given; there is: {', '.join(registry.names('data.pairs'))}.")
    keys = {item.name for item in fields(registry.find("data.pairs", section["name"]).Config)}
    channels = {"channels": backbone.channels} if "channels" in keys else {}
    source: PairSource = registry.build("data.pairs", {**section, **channels})
    return source


def same_place(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Each point's own place in the second image, by share of its sides: (n, 2), twice, as matched()."""
    first, second = (np.array(size_of(image)) for image in (pair.first, pair.second))
    places = pair.points[0] / first * second
    return places, places


def matched(cfg: Config, dense: DenseBackbone, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The middles (n, 2) of patches of the second image, in pixels: the nearest by feature, and by place."""
    first, grid = patches_of(dense, pair.first, cfg.resize)
    second, second_grid = patches_of(dense, pair.second, cfg.resize)
    answers = nearest_patches(first, second, torch.from_numpy(grid.to_patches(pair.points[0])))
    sides = np.array([second.shape[2], second.shape[1]])
    best = np.clip(np.floor(second_grid.to_patches(pair.points[1])), 0, sides - 1) + 0.5
    return second_grid.to_pixels(answers.numpy()), second_grid.to_pixels(best)


def nearest_patches(first: Tensor, second: Tensor, points: Tensor) -> Tensor:
    """The middle (n, 2) of the patch of `second` that is most similar to each point of `first`, in patches.

    Args:
        first: (D, h', w'); between the middles of patches it is interpolated.
        second: (D, h, w).
        points: (n, 2) x and y in patches of `first`.
    """
    sides = torch.tensor([first.shape[2], first.shape[1]])
    places = (points / sides * 2 - 1).to(first)
    sampled = F.grid_sample(first[None], places[None, None], padding_mode="border", align_corners=False)
    x, keys = F.normalize(sampled[0, :, 0].T, dim=1), F.normalize(second.flatten(1), dim=0)
    best = (x @ keys).argmax(dim=1).cpu()
    return torch.stack([best % second.shape[2], best // second.shape[2]], dim=1).double() + 0.5
