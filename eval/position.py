"""How much patch features say about the place of a patch, and how much is left after RASA takes it out.

RASA (Venkataramanan et al. 2025, Franca, arXiv 2507.14137): the place of a patch is predicted from its
feature by a linear map, and the two directions of this map are projected out of all features; then again,
with what is left. All rounds together are one projection x - x Q Q'. Franca fits each map by AdamW, through a
sigmoid; here it is the least squares solution. All patches are in memory at once.

    R  patches of all images      D  width      k  directions that were taken out
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinokit.config.registry import check_at_least, source_field
from dinokit.eval import ImageConfig
from dinokit.eval._images import image_features, image_sizes, open_source
from dinokit.features import AllPatches
from dinokit.models import Backbone

SMALLEST = 1e-10  # of the largest eigenvalue: smaller ones are rounding


@dataclass
class Config(ImageConfig):
    train: dict[str, Any] | None = source_field("data.sources", "train", labels=False)
    test: dict[str, Any] | None = source_field("data.sources", "test", labels=False)
    # Test images that are training images too are not refused: the place of a patch is no label.
    max_train: int = 300  # images, drawn evenly from the set; 0: all. Their patches are in memory at once
    max_test: int = 300  # images, likewise
    rounds: int = 4  # of RASA, each of which takes out two directions; Franca has up to 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_train=0, rounds=1)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Share of the variance of the place that a linear map of patch features predicts, on test images.

    Returns:
        'r2' of the features, and 'r2_debiased' after RASA with a new map: 1 if the place is known, 0 or less
        if nothing is. 'variance_removed': the share of the variance of features that RASA takes out.
        'images_train' and 'images_test': how many could be read.

    Raises:
        ValueError, LookupError: if the images cannot be read, or the backbone gives no map of patches.
    """
    cfg = replace(cfg, cache=None)  # the patches would fill it
    size = image_sizes(cfg, backbone)[1]
    side = size // backbone.patch
    found = []
    for key, section, limit in (("train", cfg.train, cfg.max_train), ("test", cfg.test, cfg.max_test)):
        source = open_source(section, key, backbone, limit, labelled=False)
        features = image_features(cfg, key, backbone, source, AllPatches(size=size), labelled=False)
        found.append(features.x.unflatten(1, (side * side, -1)))  # (images, N, D)
    train, test = (x.flatten(0, 1).double() for x in found)
    places = [patch_places(side, side).to(train.device).repeat(len(x), 1) for x in found]
    q = position_directions(train, places[0], cfg.rounds)
    centred = test - test.mean(dim=0)
    return {
        "r2": r_squared(train, places[0], test, places[1]),
        "r2_debiased": r_squared(remove(train, q), places[0], remove(test, q), places[1]),
        "variance_removed": float((centred @ q).square().sum() / centred.square().sum()),
        "images_train": len(found[0]),
        "images_test": len(found[1]),
    }


def patch_places(height: int, width: int) -> Tensor:
    """Row and column of each patch of a grid, in [0, 1], row after row: (height * width, 2) float64."""
    rows, columns = (torch.linspace(0, 1, count, dtype=torch.float64) for count in (height, width))
    return torch.cartesian_prod(rows, columns)


def position_directions(x: Tensor, places: Tensor, rounds: int) -> Tensor:
    """Orthonormal directions Q (D, k), k = 2 * rounds, that tell the places of patches x; fewer if D is.

    Args:
        x: features (R, D), float64.
        places: of the patches (R, 2).
        rounds: fits, each to what the directions of those before leave.
    """
    q = x.new_zeros(x.shape[1], 0)
    for _ in range(min(rounds, x.shape[1] // 2)):
        new = linear_fit(remove(x, q), places)
        q = torch.linalg.qr(torch.cat([q, new], dim=1)).Q
    return q


def remove(x: Tensor, q: Tensor) -> Tensor:
    """Features x (R, D) without their part along the orthonormal directions q (D, k)."""
    return x - x @ q @ q.T


def linear_fit(x: Tensor, y: Tensor) -> Tensor:
    """The shortest A (D, 2) for which x A is nearest to y (R, 2), both centred."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return torch.linalg.pinv(x.T @ x, rtol=SMALLEST, hermitian=True) @ (x.T @ y)


def r_squared(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """1 - the squared error of test_y by the linear fit of x to y, over that by the mean of y."""
    predicted = y.mean(dim=0) + (test_x - x.mean(dim=0)) @ linear_fit(x, y)
    return float(1 - (test_y - predicted).square().sum() / (test_y - y.mean(dim=0)).square().sum())
