"""Pictures of data and features: crops of a recipe, principal components of patches, attention, neighbours.

`crops` and `neighbours` return one sheet of tiles, uint8 (H, W, 3); `pca`, `attention` and `similarity`
return pictures for each image. `figure` writes several under titles to a PNG; `line_chart` makes an SVG.

b  images     h, w  patches down and across     D  width of features     S  side of an image in pixels
H  heads of attention
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.augment import Photometric
from dinokit.data.decode import UNREADABLE, as_image
from dinokit.data.loader import training_loader
from dinokit.data.masks import BlockMasks
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import FitTransform
from dinokit.features.extract import spread
from dinokit.features.tokens import attention as class_attention
from dinokit.features.tokens import dense, device_of, frozen, last_blocks, normalised
from dinokit.models import Backbone

Picture = NDArray[np.uint8]  # (H, W, 3)

GAP = 2  # white pixels between tiles
FRAME = 3  # pixels of the frame that says whether a neighbour has the class of its query
SAME, OTHER = (40, 160, 60), (210, 50, 40)  # colours of that frame
CLIPPED = 0.02  # share of the values of a principal component that may lie outside its colours, at each end
FITTED = 100_000  # patches that principal components are fitted to, at most
MASKED = 0.5  # grey of masked patches
PATCHES = 16  # patches along the longer side of an image whose maps are drawn, at least
DPI = 100
HEAT = "inferno"
LINES = "#3b82c4", "#d97706", "#2e9e5b", "#c0504d", "#8b5cf6", "#0d9488"  # read well on white and on black
INK = "#010203"  # of axes and labels; becomes currentColor


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


def pca(backbone: Backbone, images: Sequence[Any], size: int = 0, foreground: bool = False) -> list[Picture]:
    """The first three principal components of patch features as red, green and blue, a picture an image.

    The components are those of all images together: the same colour means similar patches in all pictures.

    Args:
        backbone: one with patches.
        images: files, Pillow images, arrays or tensors, as as_image() takes them; resized as fit() does.
        size: pixels of the longer side, 0: the backbone's, or 16 patches if that is more.
        foreground: leave the background black, and fit the colours to the rest (DINOv2, figure 1).

    Raises:
        ValueError: if the backbone has no patches or other channels.
    """
    inputs = [fit(backbone, image, size) for image in images]
    colours = component_colours(patch_features(backbone, inputs), foreground)
    return [enlarge(picture, x.shape[1], x.shape[2]) for picture, x in zip(colours, inputs, strict=True)]


def progress(recipe: Recipe, source: ImageSource, backbone: Backbone, images: int = 8) -> dict[str, Picture]:
    """Pictures to follow a run by: crops of its first step, and components of a few images' patches.

    Both show the same images whenever they are drawn. Unreadable images are left out.
    """
    shown = []
    for i in range(min(images, len(source))):
        with suppress(*UNREADABLE):
            shown.append(spread(source, images)[i][0])
    patches = [boxed(picture, 128) for picture in pca(backbone, shown)]
    originals = [boxed(to_picture(fit(backbone, image)), 128) for image in shown]
    return {
        "crops": crops(recipe, source, min(4, recipe.optim.batch)),
        "patches": grid([originals, patches]),
    }


def component_colours(features: Sequence[Tensor], foreground: bool = False) -> list[Picture]:
    """Principal components of the features (h, w, D) of images as colours (h, w, 3), as pca()."""
    flat = torch.cat([x.flatten(0, 1) for x in features]).float()
    kept = torch.ones(len(flat), dtype=torch.bool)
    if foreground:
        kept = torch.cat([mask.flatten() for mask in foreground_masks(features)])
        kept = kept if kept.sum() > 3 else torch.ones_like(kept)
    y = _components(flat[kept], 3)
    low, high = (torch.quantile(y[:: len(y) // FITTED + 1], q, dim=0) for q in (CLIPPED, 1 - CLIPPED))
    colours = torch.zeros(len(flat), 3)
    colours[kept] = ((y - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = colours.split([x.shape[0] * x.shape[1] for x in features])
    return [
        _to_pictures(part.unflatten(0, x.shape[:2]).movedim(2, 0)[None])[0]
        for part, x in zip(parts, features, strict=True)
    ]


def foreground_masks(features: Sequence[Tensor]) -> list[Tensor]:
    """Which patches (h, w) of features (h, w, D) are foreground, by the sign of the first component.

    The component separates objects from background in features of a trained backbone (DINOv2, arXiv
    2304.07193, section 7.5). Its sign has no meaning: the foreground is the side that has fewer of the
    patches at the edges of the images.
    """
    first = _components(torch.cat([x.flatten(0, 1) for x in features]).float(), 1)[:, 0]
    parts = first.split([x.shape[0] * x.shape[1] for x in features])
    positive = [part.unflatten(0, x.shape[:2]) > 0 for part, x in zip(parts, features, strict=True)]
    edges = torch.cat([torch.cat([m[0], m[-1], m[:, 0], m[:, -1]]) for m in positive])
    return [~m for m in positive] if edges.float().mean() > 0.5 else positive


def _components(x: Tensor, count: int) -> Tensor:
    """The coordinates (n, count) of rows x (n, D) along their first principal axes."""
    x = x - x.mean(dim=0)
    fitted = x[:: len(x) // FITTED + 1]
    _, vectors = torch.linalg.eigh(fitted.T @ fitted)  # by eigenvalue, the largest last
    axes = vectors[:, -count:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # an axis has no sign itself
    return x @ axes


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
    """The cosine of every patch with the patch at `point` of the first image; black is 0 or less, white 1.

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
    return [enlarge(heat(f @ query), x.shape[1], x.shape[2]) for f, x in zip(features, inputs, strict=True)]


def fit(backbone: Backbone, image: Any, size: int = 0) -> Tensor:
    """The image (C, H, W), uint8 or in [0, 1], its longer side about `size`, both multiples of the patch."""
    size = size or max(backbone.input.size, PATCHES * backbone.patch)
    return FitTransform("resize", size, size, backbone.patch)(as_image(image, backbone.channels))


def patch_features(backbone: Backbone, images: Sequence[Tensor]) -> list[Tensor]:
    """Features (h, w, D) of the patches of images (C, H, W) of any sizes, on the CPU."""
    with frozen(backbone):
        maps = [dense(backbone, x[None].to(device_of(backbone)), last_blocks(backbone, 1))[0] for x in images]
    return [m.patches[0].movedim(0, 2).cpu() for m in maps]


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
                picture = _framed(picture, SAME if labels[index] == labels[query] else OTHER)
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


@dataclass
class Line:
    """A curve of a chart."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = LINES[0]
    dashed: bool = False


def line_chart(
    lines: Sequence[Line], marks: Sequence[float] = (), size: tuple[float, float] = (3.4, 1.9)
) -> str:
    """Curves as an <svg> element: text and axes in the colour of the page, which may be light or dark.

    Args:
        lines: at least one.
        marks: places of vertical dotted lines.
        size: width and height in inches of 72 pixels.
    """
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "dinokit", "text.parse_math": False}
    settings |= {"font.size": 8, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}
    with rc_context(settings):
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.add_subplot()
        for place in marks:
            axes.axvline(place, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
        for line in lines:
            marker, style = "." if len(line.x) < 20 else "", "--" if line.dashed else "-"
            axes.plot(
                line.x, line.y, color=line.colour, linestyle=style, linewidth=1.4, marker=marker, markersize=4
            )
        axes.tick_params(colors=INK, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.ticklabel_format(axis="y", useOffset=False)
        file = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(
        r"<defs>\s*<style.*?</defs>", "", svg[svg.index("<svg") :], flags=re.S
    )  # it has a rule for *
    return re.sub(r' id="[a-z_.]+\d+"(?=>)', "", svg).replace(INK, "currentColor")


def heat(values: Tensor) -> Picture:
    """Numbers (h, w) in [0, 1] as colours from black to yellow."""
    colours = colormaps[HEAT](values.clamp(0, 1).cpu().numpy())[..., :3]
    return np.ascontiguousarray((colours * 255).round().astype(np.uint8))


def enlarge(picture: Picture, height: int, width: int) -> Picture:
    """A picture with every pixel repeated, to another size."""
    h, w, _ = picture.shape
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return np.ascontiguousarray(picture[rows][:, columns])


def boxed(picture: Picture, side: int) -> Picture:
    """A picture on a white square, its longer side resized to `side`."""
    image = ImageOps.contain(Image.fromarray(picture), (side, side), Image.Resampling.NEAREST)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)


def marked(picture: Picture, point: tuple[float, float]) -> Picture:
    """A copy of a picture with a cross at `point`: across and down, as shares of 1."""
    height, width, _ = picture.shape
    x, y = min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)
    arm, copy = max(min(height, width) // 12, 2), picture.copy()
    copy[max(y - arm, 0) : y + arm + 1, x] = OTHER
    copy[y, max(x - arm, 0) : x + arm + 1] = OTHER
    return copy


def to_picture(image: Tensor) -> Picture:
    """An image (C, H, W), uint8 or in [0, 1], as (H, W, 3)."""
    x = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return _to_pictures(x[None])[0]


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
