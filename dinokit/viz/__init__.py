"""Pictures of data and features: crops, principal components of patches, attention, neighbours, maps.

`crops` and `neighbours` return one sheet of tiles, uint8 (H, W, 3); `pca`, `attention` and `similarity`
return pictures for each image; `map_images` returns places. `figure` writes several pictures under titles to
a PNG, `write_animation` frames; `line_chart` makes an SVG. A `Basis` makes the colours of several pictures
the same.

b  images     h, w  patches down and across     D  width of features     S  side of an image in pixels
H  heads of attention
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.batch import stack
from dinokit.data.decode import UNREADABLE, as_image
from dinokit.data.loader import training_loader
from dinokit.data.masks import BlockMasks
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import FitTransform, center_crop
from dinokit.features.extract import spread
from dinokit.features.tokens import attention as class_attention
from dinokit.features.tokens import dense, device_of, frozen, last_blocks, normalised
from dinokit.models import Backbone
from dinokit.viz.animation import FPS, evenly, is_animated, read_frames, write_animation
from dinokit.viz.components import BASIS, Basis, coherence, run_basis
from dinokit.viz.draw import (
    FRAME,
    GAP,
    LINES,
    OTHER,
    SAME,
    Line,
    Picture,
    boxed,
    class_colours,
    enlarge,
    figure,
    framed,
    grid,
    heat,
    line_chart,
    marked,
    to_picture,
    to_pictures,
)
from dinokit.viz.map import Method, Points, map_method, map_picture, map_points, spaced

__all__ = [
    "BASIS", "FPS", "FRAME", "GAP", "LINES", "OTHER", "SAME", "Basis", "Line", "Picture", "attention",
    "boxed", "centres", "class_colours", "class_tokens", "coherence", "crops", "enlarge", "evenly", "figure",
    "fit", "framed", "grid", "heat", "is_animated", "line_chart",
    "map_images", "map_method", "map_picture", "map_points", "marked", "nearest", "neighbours",
    "patch_features", "pca", "progress", "read_frames", "run_basis", "similarity", "spaced", "to_picture",
    "write_animation",
]  # fmt: skip

MASKED = 0.5  # grey of masked patches
BATCH = 32  # images that a backbone sees at a time
PATCHES = 16  # patches along the longer side of an image whose maps are drawn, at least


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
    pictures = [to_pictures(F.interpolate(column, (tile, tile))) for column in columns]
    return grid([[column[row] for column in pictures] for row in range(images)])


def pca(
    backbone: Backbone, images: Sequence[Any], size: int = 0, foreground: bool = False,
    basis: Basis | None = None,
) -> list[Picture]:  # fmt: skip
    """The first three principal components of patch features as red, green and blue, a picture an image.

    The components are those of all images together: the same colour means similar patches in all pictures.

    Args:
        backbone: one with patches.
        images: files, Pillow images, arrays or tensors, as as_image() takes them; resized as fit() does.
        size: pixels of the longer side, 0: the backbone's, or 16 patches if that is more.
        foreground: leave the background black, and fit the colours to the rest (DINOv2, figure 1).
        basis: of other images, so that their pictures have the same colours for the same features.

    Raises:
        ValueError: if the backbone has no patches or other channels.
    """
    inputs = [fit(backbone, image, size) for image in images]
    features = patch_features(backbone, inputs)
    colours = (basis or Basis.fit(features)).colours(features, foreground)
    return [enlarge(picture, x.shape[1], x.shape[2]) for picture, x in zip(colours, inputs, strict=True)]


def progress(recipe: Recipe, source: ImageSource, backbone: Backbone, images: int = 8) -> dict[str, Picture]:
    """Pictures to follow a run by: crops of its first step, and components of a few images' patches.

    Both show the same images whenever they are drawn, and the same feature has the same colour, as in the
    run's report. Unreadable images are left out.
    """
    shown = []
    for i in range(min(images, len(source))):
        with suppress(*UNREADABLE):
            shown.append(spread(source, images)[i][0])
    inputs = [fit(backbone, image) for image in shown]
    features = patch_features(backbone, inputs)
    basis, _ = run_basis(features, Path(recipe.run.out) / BASIS)
    pictures = zip(basis.colours(features), inputs, strict=True)
    patches = [boxed(enlarge(colours, x.shape[1], x.shape[2]), 128) for colours, x in pictures]
    originals = [boxed(to_picture(x), 128) for x in inputs]
    return {
        "crops": crops(recipe, source, min(4, recipe.optim.batch)),
        "patches": grid([originals, patches]),
    }


def attention(
    backbone: Backbone, images: Sequence[Any], size: int = 0, block: int = -1
) -> list[list[Picture]]:
    """Attention of the class token over the patches, a picture for each head of each image; bright is high.

    Args:
        backbone: a ViT.
        images: as for pca().
        size: as for pca().
        block: its number; -1: the last one, as in DINO (arXiv 2104.14294, figure 1).

    Raises:
        ValueError: if the backbone has no such block or another kind of attention.
    """
    pictures = []
    for image in images:
        x = fit(backbone, image, size)
        h, w = x.shape[1] // backbone.patch, x.shape[2] // backbone.patch
        crops = normalised(backbone, x[None].to(device_of(backbone)))
        heads = class_attention(backbone, crops, block)[0, :, -h * w :].unflatten(1, (h, w)).cpu()
        pictures.append([enlarge(heat(m / m.max()), x.shape[1], x.shape[2]) for m in heads])
    return pictures


def similarity(
    backbone: Backbone, images: Sequence[Any], point: tuple[float, float] = (0.5, 0.5), size: int = 0
) -> list[Picture]:
    """The cosine of every patch with the patch at `point` of the first image.

    Black is the lowest cosine of all these images, and the brightest 1: what all patches share, which is most
    of a feature after a contrast, would otherwise leave every picture bright.

    Args:
        backbone: one with patches.
        images: as for pca().
        point: across and down, as shares of the first image.
        size: as for pca().
    """
    inputs = [fit(backbone, image, size) for image in images]
    features = [F.normalize(x, dim=2) for x in patch_features(backbone, inputs)]
    h, w, _ = features[0].shape
    query = features[0][min(int(point[1] * h), h - 1), min(int(point[0] * w), w - 1)]
    cosines = [f @ query for f in features]
    low = min(float(cosine.min()) for cosine in cosines)
    shares = [(cosine - low) / max(1 - low, 1e-6) for cosine in cosines]
    return [enlarge(heat(s), x.shape[1], x.shape[2]) for s, x in zip(shares, inputs, strict=True)]


def fit(backbone: Backbone, image: Any, size: int = 0) -> Tensor:
    """The image (C, H, W), uint8 or in [0, 1], its longer side about `size`, both multiples of the patch."""
    size = size or max(backbone.input.size, PATCHES * backbone.patch)
    return FitTransform("resize", size, size, backbone.patch)(as_image(image, backbone.channels))


def patch_features(backbone: Backbone, images: Sequence[Tensor]) -> list[Tensor]:
    """Features (h, w, D) of the patches of images (C, H, W) of any sizes, on the CPU."""
    with frozen(backbone):
        maps = [dense(backbone, x[None].to(device_of(backbone)), last_blocks(backbone, 1))[0] for x in images]
    return [m.patches[0].movedim(0, 2).cpu() for m in maps]


def class_tokens(backbone: Backbone, crops: Sequence[Tensor], seconds: float = math.inf) -> Tensor:
    """Class tokens (n, D) of images (C, S, S), on the CPU; of the first ones if the time is over."""
    rows, begin = [], time.monotonic()
    with frozen(backbone), torch.inference_mode():
        for start in range(0, len(crops), BATCH):
            x = stack(crops[start : start + BATCH]).to(device_of(backbone))
            rows.append(backbone([normalised(backbone, x)], [None])[0].cls.float().cpu())
            if time.monotonic() - begin > seconds:
                break
    return torch.cat(rows)


def map_images(backbone: Backbone, images: Sequence[Any], method: Method = "auto", size: int = 0) -> Points:
    """Places (n, 2) of images in two dimensions, in [0, 1]: similar images are near each other.

    Args:
        backbone: its class tokens are compared.
        images: as for pca(); their centres are seen.
        method: as for map_points().
        size: pixels of the centre crop; 0: as trained.

    Raises:
        RuntimeError: as map_points().
        ValueError: if the backbone takes other channels, or an image cannot be read.
    """
    return map_points(class_tokens(backbone, centres(backbone, images, size)), method)


def centres(backbone: Backbone, images: Sequence[Any], size: int = 0) -> list[Tensor]:
    """The centres (C, S, S) of images, resized, as evaluation sees them; size as for map_images()."""
    side = size or backbone.input.size
    return [center_crop(as_image(image, backbone.channels), side, side) for image in images]


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
    rows = []
    for query, found in zip(queries, nearest(features, queries, k)[0].tolist(), strict=True):
        row = [images[query]]
        for index in found:
            picture = images[index]
            if labels is not None:
                picture = framed(picture, SAME if labels[index] == labels[query] else OTHER)
            row.append(picture)
        rows.append(row)
    return grid(rows)


def nearest(features: Tensor, queries: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """The k rows of features (n, D) most similar to each query, and their cosines: (q, k), (q, k)."""
    x = F.normalize(features.float(), dim=1)
    cosines = x[list(queries)] @ x.T
    cosines[torch.arange(len(queries)), list(queries)] = -2.0
    values, indices = cosines.topk(min(k, len(x) - 1))
    return indices, values
