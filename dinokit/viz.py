"""Pictures of data and features: crops of a recipe, principal components of patches, nearest neighbours.

`crops`, `pca` and `neighbours` return uint8 arrays (H, W, 3); `figure` writes several under titles to a PNG.

b  images     h, w  patches down and across     D  width of features     S  side of an image in pixels
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.loader import training_loader
from dinokit.data.masks import BlockMasks
from dinokit.data.sources import ImageSource

Picture = NDArray[np.uint8]  # (H, W, 3)

GAP = 2  # white pixels between tiles
FRAME = 3  # pixels of the frame that says whether a neighbour has the class of its query
SAME, OTHER = (40, 160, 60), (210, 50, 40)  # colours of that frame
CLIPPED = 0.02  # share of the values of a principal component that may lie outside its colours, at each end
MASKED = 0.5  # grey of masked patches
DPI = 100


def crops(recipe: Recipe, source: ImageSource, images: int = 4, locals_: int = 4, tile: int = 96) -> Picture:
    """What a step sees of some images, a row each: global crops, the same with masked patches, local crops.

    Args:
        recipe: its crops, colours and masks are applied. Without masks, or with a backbone whose patch the
            recipe does not name, the masked crops are left out.
        source: its images are those of the first step of the recipe.
        images: rows; the recipe's batch must be as large.
        locals_: local crops of a row, at most.
        tile: pixels of the side of a tile.

    Raises:
        ValueError: if the recipe's crops do not fit the images.
    """
    cfg, patch = recipe.crops, recipe.backbone.get("patch")
    masks = None
    if recipe.masks is not None and patch:
        side = cfg.globals.size // patch
        masks = BlockMasks(replace(recipe.masks, images=1.0), (side, side))
    loader = training_loader(
        source, cfg, masks, seed=recipe.run.seed, start_step=0, steps=1, batch=images, workers=0
    )
    batch = next(iter(loader))
    photometric = Photometric(cfg)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (cfg.mean, cfg.std))
    shown = photometric(batch.global_crops, batch.global_colour) * std + mean  # (G * b, C, S, S)
    columns = list(shown.unflatten(0, (-1, images)))
    if batch.masks is not None:
        hidden = batch.masks.unflatten(1, (side, side))[:, None].float()
        hidden = F.interpolate(hidden, shown.shape[-2:])
        columns += list(torch.where(hidden > 0, MASKED, shown).unflatten(0, (-1, images)))
    if len(batch.local_crops):
        local = photometric(batch.local_crops, batch.local_colour) * std + mean
        columns += list(local.unflatten(0, (-1, images))[:locals_])
    pictures = [_to_pictures(F.interpolate(column, (tile, tile))) for column in columns]
    return grid([[column[row] for column in pictures] for row in range(images)])


def pca(features: Tensor, tile: int = 96) -> Picture:
    """The first three principal components of patch features as red, green and blue: one row of tiles.

    The components are those of all images together, so the same colour means similar patches in all tiles.

    Args:
        features: (b, h, w, D), with three numbers or more per patch.
        tile: pixels of the side of a tile.
    """
    shape = features.shape[:3]
    x = features.flatten(0, 2).float()
    x = x - x.mean(dim=0)
    _, vectors = torch.linalg.eigh(x.T @ x)  # by eigenvalue, the largest last
    axes = vectors[:, -3:].flip(1)
    axes = (
        axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    )  # an axis has no sign of its own
    y = x @ axes
    low, high = (torch.quantile(y[:: len(y) // 100_000 + 1], q, dim=0) for q in (CLIPPED, 1 - CLIPPED))
    colours = ((y - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).unflatten(0, shape).movedim(3, 1)
    return grid([list(_to_pictures(F.interpolate(colours, (tile, tile))))])


def neighbours(
    images: Picture, features: Tensor, queries: Sequence[int], k: int = 6, labels: Sequence[int] | None = None
) -> Picture:
    """Some images, and at the right of each the k others with the most similar features.

    Args:
        images: (n, S, S, 3) uint8.
        features: (n, D); similarity is their cosine.
        queries: indices of the images to begin rows with.
        k: neighbours in a row.
        labels: (n,) classes; a frame then is green around a neighbour of the query's class, else red.
    """
    x = F.normalize(features.float(), dim=1)
    rows = []
    for query in queries:
        cosines = x @ x[query]
        cosines[query] = -2.0
        nearest = cosines.topk(k).indices.tolist()
        row = [images[query]]
        for index in nearest:
            picture = images[index]
            if labels is not None:
                picture = _framed(picture, SAME if labels[index] == labels[query] else OTHER)
            row.append(picture)
        rows.append(row)
    return grid(rows)


def grid(rows: Sequence[Sequence[Picture]]) -> Picture:
    """Rows of pictures of one size (h, w, 3) on white; shorter rows end in white."""
    height, width, _ = rows[0][0].shape
    across = max(len(row) for row in rows)
    shape = len(rows) * (height + GAP) + GAP, across * (width + GAP) + GAP, 3
    sheet = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def figure(panels: Mapping[str, Picture], path: Path) -> None:
    """Write pictures, one below the other, each under its title, to a PNG."""
    title = 24  # pixels
    widest = max(picture.shape[1] for picture in panels.values())
    heights = [picture.shape[0] * widest / picture.shape[1] for picture in panels.values()]
    total = sum(heights) + (title + GAP) * len(panels)
    drawing = Figure(figsize=(widest / DPI, total / DPI), dpi=DPI)
    top = total
    for (text, picture), height in zip(panels.items(), heights, strict=True):
        top -= title + height
        axes = drawing.add_axes((0, top / total, 1, height / total))
        axes.imshow(picture, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(text, loc="left", fontsize=10, pad=4)
        top -= GAP
    drawing.savefig(path)


def _to_pictures(x: Tensor) -> Picture:
    """Images (b, C, h, w) in [0, 1] as (b, h, w, 3): one channel is grey, of many three are shown."""
    x = x.repeat(1, 3, 1, 1) if x.shape[1] < 3 else x[:, :3]
    pixels = (x.clamp(0, 1) * 255).round().byte().movedim(1, 3)
    return np.ascontiguousarray(pixels.cpu().numpy())


def _framed(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    framed = np.empty_like(picture)
    framed[:] = colour
    framed[FRAME:-FRAME, FRAME:-FRAME] = picture[FRAME:-FRAME, FRAME:-FRAME]
    return framed
