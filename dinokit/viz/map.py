"""Maps of image sets: similar images lie near each other in two dimensions.

n  images     D  width of features     S  side of a thumbnail in pixels
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinokit.viz.components import Components
from dinokit.viz.draw import Picture, class_colours, framed

Points = NDArray[np.float32]  # (n, 2): across and down, in [0, 1]
Method = Literal["auto", "tsne", "pca"]

PERPLEXITY = 30  # about the neighbours of an image that t-SNE keeps near it
DOT = 3  # pixels from the centre of a dot to its edge
GREY = (140, 140, 140)  # of dots without a class
SMALL = 1e-12  # range of coordinates of images that are all alike


def map_method(method: Method) -> Literal["tsne", "pca"]:
    """Which method `auto` is here: t-SNE, if scikit-learn is installed."""
    installed = find_spec("sklearn") is not None
    return ("tsne" if installed else "pca") if method == "auto" else method


def map_points(features: Tensor, method: Method = "auto", seed: int = 0) -> Points:
    """Places of images in two dimensions, by the cosine of their features: similar ones are near each other.

    Args:
        features: (n, D), such as class_tokens().
        method: tsne (van der Maaten and Hinton, JMLR 9, 2008), which keeps neighbours together and needs
            scikit-learn; pca: the first two principal components, which keep large distances.
        seed: of t-SNE.

    Returns:
        (n, 2) float32: across and down; each axis fills [0, 1].

    Raises:
        RuntimeError: if scikit-learn is needed and not installed.
    """
    x = F.normalize(features.float(), dim=1)
    places = Components.fit(x, 2).coordinates(x).numpy()
    if map_method(method) == "tsne" and len(x) > 3 and np.ptp(places) > SMALL:
        try:
            manifold = import_module("sklearn.manifold")
        except ModuleNotFoundError:
            raise RuntimeError("method=tsne needs scikit-learn: pip install scikit-learn") from None
        # From the components, so that the map does not depend on where a random start would have led.
        first = places / max(float(places[:, 0].std()), SMALL) * 1e-4
        perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
        places = manifold.TSNE(2, perplexity=perplexity, init=first, random_state=seed).fit_transform(
            x.numpy()
        )
    low, size = places.min(axis=0), np.ptp(places, axis=0)
    return np.where(size > SMALL, (places - low) / np.maximum(size, SMALL), 0.5).astype(np.float32)


def spaced(points: Points, width: float, height: float) -> list[int]:
    """The images whose thumbnails would not cover that of an earlier one.

    Args:
        points: of map_points(). The left upper corner of a thumbnail is at points * (1 - (width, height)).
        width: of a thumbnail, as a share of the map.
        height: likewise.
    """
    corners = points * (1 - np.array([width, height], np.float32))
    shown: list[int] = []
    for i, corner in enumerate(corners):
        away = np.abs(corners[shown] - corner) >= (width, height)
        if away.any(axis=1).all():
            shown.append(i)
    return shown


def map_picture(
    thumbnails: Picture,
    points: Points,
    labels: Sequence[int] | None = None,
    size: tuple[int, int] = (1200, 900),
) -> Picture:
    """A map with the thumbnails that have room; the other images are dots.

    Args:
        thumbnails: (n, S, S, 3) uint8.
        points: of map_points().
        labels: (n,) classes, each with a colour of frames and dots; -1 has none.
        size: width and height in pixels.
    """
    width, height = size
    side = thumbnails.shape[1]
    sheet = np.full((height, width, 3), 255, np.uint8)
    colours = class_colours(max(labels, default=0) + 1 if labels is not None else 0)
    shown = set(spaced(points, side / width, side / height))
    corners = (points * (width - side, height - side)).round().astype(int)
    for i in sorted(range(len(points)), key=lambda i: i in shown):  # thumbnails lie over dots
        left, top = corners[i]
        colour = colours[labels[i]] if labels is not None and labels[i] >= 0 else None
        if i in shown:
            picture = framed(thumbnails[i], colour) if colour else thumbnails[i]
            sheet[top : top + side, left : left + side] = picture
        else:
            x, y = left + side // 2, top + side // 2
            sheet[y - DOT : y + DOT + 1, x - DOT : x + DOT + 1] = colour or GREY
    return sheet
