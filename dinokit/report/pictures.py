"""The pictures of a run in its report: crops, patch features, attention, nearest neighbours; facts of images.

They show images of the test split where the data has one, else those of training.
"""

import io
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinokit import viz
from dinokit.config import registry
from dinokit.config.load import Recipe
from dinokit.data.batch import stack
from dinokit.data.decode import UNREADABLE, ImageLike
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import center_crop, size_of, thumbnail
from dinokit.features.extract import spread
from dinokit.features.tokens import device_of, frozen, normalised
from dinokit.models import Backbone
from dinokit.runtime.device import pick_device
from dinokit.weights import load_backbone

GALLERY, SECONDS = 400, 15.0  # images among which neighbours are searched, and for their reading, at most
SHOWN, WITH_HEADS, HEADS = 12, 4, 8  # images; those with attention maps, and heads of each
QUERIES, NEIGHBOURS = 6, 7  # rows, and neighbours in each
SIDE = 224  # pixels of a picture, which a page shows at half that size
BATCH = 32
COHERENT = 0.25  # least coherence() of a mask that shows objects


@dataclass
class Gallery:
    """Images that were read for the pictures."""

    images: list[ImageLike] = field(default_factory=list)  # the first SHOWN
    crops: list[Tensor] = field(default_factory=list)  # centres (C, S, S) of all
    thumbnails: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class Tile:
    """A picture of a page."""

    name: str
    caption: str = ""
    src: str = ""  # empty: there is no picture
    kind: str = ""  # query, same, other
    short: str = ""  # a second line
    alt: str = ""
    sharp: bool = False  # show pixels, not a smooth picture


def data_uri(picture: Image.Image | viz.Picture) -> str:
    """A picture for the attribute src: PNG for arrays, which have few colours; JPEG for images."""
    image = picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)
    kind = "JPEG" if isinstance(picture, Image.Image) else "PNG"
    with io.BytesIO() as file:
        image.save(file, kind, quality=80, optimize=True)
        return f"data:image/{kind.lower()};base64,{b64encode(file.getvalue()).decode()}"


@dataclass
class Pictures:
    """The sections of a page that show images; an empty one has its reason in `notes`."""

    notes: dict[str, str] = field(default_factory=dict)
    crops: str = ""
    crops_text: str = ""
    pca: list[list[Tile]] = field(default_factory=list)  # of each image: image, colours, foreground
    foreground: bool = False
    attention: list[tuple[str, list[Tile]]] = field(default_factory=list)
    neighbours: list[tuple[str, list[Tile]]] = field(default_factory=list)
    images: int = 0
    classes: bool = False
    scan: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, recipe: Recipe, device: str) -> "Pictures":
        """Those of a run; a section that fails gets a note."""
        page = cls()
        source = page.attempt("images", lambda: registry.build("data.sources", _test_data(recipe)))
        training = page.attempt("crops", lambda: registry.build("data.sources", recipe.data))
        if training is not None:
            page.attempt("crops", lambda: page.draw_crops(recipe, training))
        backbone = page.attempt("pca", lambda: load_backbone(folder).to(pick_device(device)))
        size = backbone.input.size if backbone is not None else recipe.crops.globals.size
        gallery = page.attempt("images", lambda: read_gallery(source, size)) if source is not None else None
        if gallery is not None:
            page.scan = scan(source, gallery)
        if gallery is not None and backbone is not None:
            page.attempt("pca", lambda: page.draw_pca(backbone, gallery))
            page.attempt("attention", lambda: page.draw_attention(backbone, gallery))
            page.attempt("neighbours", lambda: page.draw_neighbours(backbone, source, gallery))
        else:
            reason = page.notes.get("images") or page.notes["pca"]
            page.notes.update(dict.fromkeys(("pca", "attention", "neighbours"), reason))
        return page

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None if it fails, and a note says why."""
        try:
            return work()
        except Exception as error:  # a page with a note is better than none
            self.notes[name] = f"Cannot be shown: {str(error) or type(error).__name__}"
            return None

    def draw_crops(self, recipe: Recipe, source: ImageSource) -> None:
        """The crops of four images of the first step."""
        self.crops = data_uri(viz.crops(recipe, source))
        parts = ["global crops"]
        parts += ["the same with masked patches in grey"] if recipe.masks is not None else []
        parts += ["local crops"] if recipe.crops.locals.count else []
        self.crops_text = f"Four images of the first step, a row each: {', '.join(parts)}."

    def draw_pca(self, backbone: Backbone, gallery: Gallery) -> None:
        """Principal components of the first images."""
        inputs = [viz.fit(backbone, image) for image in gallery.images]
        features = viz.patch_features(backbone, inputs)
        self.foreground = coherence(viz.foreground_masks(features)) > COHERENT
        columns = {"all patches": viz.component_colours(features)}
        if self.foreground:
            columns["foreground"] = viz.component_colours(features, foreground=True)
        for i, name in enumerate(gallery.names):
            if i < len(features):
                tiles = [Tile(name, short=PurePath(name).name, src=gallery.thumbnails[i], alt=name)]
                for caption, pictures in columns.items():
                    alt = f"{name}: principal components of {caption}"
                    tiles.append(Tile(name, caption, data_uri(pictures[i]), alt=alt, sharp=True))
                self.pca.append(tiles)

    def draw_attention(self, backbone: Backbone, gallery: Gallery) -> None:
        """Attention maps of a few images."""
        for i, image in enumerate(gallery.images[:WITH_HEADS]):
            name = gallery.names[i]
            tiles = [Tile(name, short=PurePath(name).name, src=gallery.thumbnails[i], alt=name)]
            for head, picture in enumerate(viz.attention(backbone, [image])[0][:HEADS]):
                alt = f"{name}: attention of head {head}"
                tiles.append(Tile(name, f"head {head}", data_uri(picture), alt=alt, sharp=True))
            self.attention.append(("", tiles))

    def draw_neighbours(self, backbone: Backbone, source: ImageSource, gallery: Gallery) -> None:
        """The nearest neighbours of a few images."""
        features = class_tokens(backbone, gallery.crops)
        self.images, self.classes = len(features), any(label >= 0 for label in gallery.labels)
        queries = [i * len(features) // QUERIES for i in range(min(QUERIES, len(features)))]
        found, cosines = viz.nearest(features, queries, NEIGHBOURS)
        for query, row, values in zip(queries, found.tolist(), cosines.tolist(), strict=True):
            tiles = [_tile(gallery, query, "query", "image", source.classes)]
            for i, value in zip(row, values, strict=True):
                same = gallery.labels[i] == gallery.labels[query]
                kind = ("same" if same else "other") if self.classes else ""
                tiles.append(_tile(gallery, i, kind, f"{value:.3f}", source.classes))
            self.neighbours.append(("", tiles))


def _tile(gallery: Gallery, i: int, kind: str, caption: str, classes: Sequence[str]) -> Tile:
    label, name = gallery.labels[i], gallery.names[i]
    caption = f"{caption} {classes[label]}" if 0 <= label < len(classes) else caption
    return Tile(name, caption, gallery.thumbnails[i], kind, PurePath(name).name, f"{name}: {caption}")


def class_tokens(backbone: Backbone, crops: Sequence[Tensor]) -> Tensor:
    """Class tokens (n, D) of images (C, S, S), of the first ones if the time is over."""
    rows, begin = [], time.monotonic()
    with frozen(backbone), torch.inference_mode():
        for start in range(0, len(crops), BATCH):
            x = stack(crops[start : start + BATCH]).to(device_of(backbone))
            rows.append(backbone([normalised(backbone, x)], [None])[0].cls.float().cpu())
            if time.monotonic() - begin > SECONDS:
                break
    return torch.cat(rows)


def read_gallery(source: ImageSource, size: int) -> Gallery:
    """Images from everywhere in a source, as many as can be read in the time, and two at least.

    Raises:
        ValueError: if fewer than two can be read.
    """
    gallery, begin = Gallery(), time.monotonic()
    sample = spread(source, GALLERY)
    for i in np.random.default_rng(0).permutation(len(sample)).tolist():
        if time.monotonic() - begin > SECONDS and len(gallery.names) > SHOWN:
            break
        try:
            image, label = sample[i]
            gallery.crops.append(center_crop(image, size, size))
        except UNREADABLE as error:
            gallery.unreadable.append(f"{sample.name(i)}: {error}")
            continue
        if len(gallery.images) < SHOWN:
            gallery.images.append(image)
        gallery.thumbnails.append(data_uri(thumbnail(image, SIDE)))
        gallery.names.append(sample.name(i))
        gallery.labels.append(label)
        gallery.sizes.append(size_of(image))
    if len(gallery.names) < 2:
        raise ValueError(
            f"{len(gallery.names)} of {len(sample)} images can be read. {gallery.unreadable[:1]}"
        )
    return gallery


def scan(source: ImageSource, gallery: Gallery) -> list[tuple[str, str]]:
    """Facts about the images that were read, as rows of a table."""
    widths, heights = zip(*gallery.sizes, strict=True)
    common, count = Counter(gallery.sizes).most_common(1)[0]
    tried = len(gallery.names) + len(gallery.unreadable)
    rows = [
        ("images", f"{len(source):,}, of which {tried:,} were read for this page"),
        ("width", f"{min(widths):,} to {max(widths):,} pixels"),
        ("height", f"{min(heights):,} to {max(heights):,} pixels"),
        ("most frequent size", f"{common[0]:,} x {common[1]:,}, {count / len(widths):.0%} of the images"),
        ("unreadable", str(len(gallery.unreadable))),
    ]
    pixels = torch.stack(
        [c.float().mean(dim=(1, 2)) / (255 if c.dtype == torch.uint8 else 1) for c in gallery.crops]
    )
    rows.append(("mean of each channel", ", ".join(f"{value:.3f}" for value in pixels.mean(dim=0).tolist())))
    if source.classes:
        rows.append(("classes", f"{len(source.classes):,}"))
    return rows + [("unreadable", name) for name in gallery.unreadable[:5]]


def coherence(masks: Sequence[Tensor]) -> float:
    """How much more often adjacent patches of masks (h, w) agree than by chance: noise 0, uniform areas 1."""
    pairs = [torch.cat([(m[1:] == m[:-1]).flatten(), (m[:, 1:] == m[:, :-1]).flatten()]) for m in masks]
    share = float(torch.cat([m.flatten() for m in masks]).float().mean())
    by_chance = share**2 + (1 - share) ** 2
    return (float(torch.cat(pairs).float().mean()) - by_chance) / max(1 - by_chance, 1e-9)


def _test_data(recipe: Recipe) -> dict[str, Any]:
    """The section `data` of a recipe, with the test split where training has the other one."""
    data = dict(recipe.data)
    return {**data, "split": "test"} if data.get("split") == "train" else data
