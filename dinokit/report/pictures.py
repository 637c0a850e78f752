"""The pictures of a run in its report: crops, patch features, attention, neighbours, a map; facts of images.

They show images of the test split where the data has one, else those of training.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dinokit import viz
from dinokit.config import registry
from dinokit.config.load import Recipe
from dinokit.data import predictions
from dinokit.data.decode import ImageLike
from dinokit.data.scan import Scan
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import center_crop, thumbnail
from dinokit.features.extract import spread
from dinokit.models import Backbone
from dinokit.report.tiles import DenseSection, Tile, css_colours, data_uri, dense_section
from dinokit.runtime.device import pick_device
from dinokit.weights import load_backbone

GALLERY, SECONDS = 400, 15.0  # images among which neighbours are searched, and for their reading, at most
SHOWN, WITH_HEADS, HEADS = 12, 4, 8  # images; those with attention maps, and heads of each
QUERIES, NEIGHBOURS = 6, 7  # rows, and neighbours in each
SIDE = 224  # pixels of a picture, which a page shows at half that size
LEGEND = 20  # classes that are named beside a map, at most
# Width and height of a thumbnail as shares of a map of 4 : 3.
THUMBNAIL = 0.05, 0.05 * 4 / 3
MAP_SIDE = 96  # pixels of a thumbnail on a map


@dataclass
class Gallery:
    """Images that were read for the pictures."""

    scan: Scan
    images: list[ImageLike] = field(default_factory=list)  # the first SHOWN
    crops: list[Tensor] = field(default_factory=list)  # centres (C, S, S) of all
    thumbnails: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


@dataclass
class Place:
    """An image on a map: a thumbnail, or a dot where there is no room."""

    name: str
    left: float  # of the left upper corner of the thumbnail, or of the dot, in percent of the map
    top: float
    colour: str = ""  # of its class
    src: str = ""  # empty: a dot
    alt: str = ""


@dataclass
class SetMap:
    """A map of an image set."""

    method: str
    places: list[Place]
    legend: list[tuple[str, str]]  # classes and colours
    width: float = 100 * THUMBNAIL[0]  # of a thumbnail, in percent


@dataclass
class Pictures:
    """The sections of a page that show images; an empty one has its reason in `notes`."""

    notes: dict[str, str] = field(default_factory=dict)
    crops: str = ""
    crops_text: str = ""
    pca: list[list[Tile]] = field(default_factory=list)  # of each image: image, colours, foreground
    basis: str = ""  # where the colours are from
    foreground: bool = False
    attention: list[tuple[str, list[Tile]]] = field(default_factory=list)
    neighbours: list[tuple[str, list[Tile]]] = field(default_factory=list)
    images: int = 0
    classes: bool = False
    map: SetMap | None = None
    predictions: list[DenseSection] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # notes about predictions
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
            page.scan = facts(source, gallery.scan)
        if gallery is not None and backbone is not None:
            page.attempt("pca", lambda: page.draw_pca(backbone, gallery, folder / viz.BASIS))
            page.attempt("attention", lambda: page.draw_attention(backbone, gallery))
            tokens = page.attempt("neighbours", lambda: viz.class_tokens(backbone, gallery.crops, SECONDS))
            if tokens is None:
                page.notes["map"] = page.notes["neighbours"]
            else:
                page.attempt("neighbours", lambda: page.draw_neighbours(tokens, source, gallery))
                page.map = page.attempt("map", lambda: set_map(tokens, source, gallery))
        else:
            reason = page.notes.get("images") or page.notes["pca"]
            page.notes.update(dict.fromkeys(("pca", "attention", "neighbours", "map"), reason))
        for path in sorted(folder.glob(f"*/{predictions.NAME}")):
            try:
                page.predictions.append(dense_section(path))
            except (ValueError, OSError) as error:
                page.failed.append(f"Cannot be shown: {error}")
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

    def draw_pca(self, backbone: Backbone, gallery: Gallery, path: Path) -> None:
        """Principal components of the first images; those in the file, if they still show something."""
        inputs = [viz.fit(backbone, image) for image in gallery.images]
        features = viz.patch_features(backbone, inputs)
        basis, self.basis = viz.run_basis(features, path)
        self.foreground = basis.separates(features)
        columns = {"all patches": basis.colours(features)}
        if self.foreground:
            columns["foreground"] = basis.colours(features, foreground=True)
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

    def draw_neighbours(self, features: Tensor, source: ImageSource, gallery: Gallery) -> None:
        """The nearest neighbours of a few images among those whose features (n, D) are known."""
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


def set_map(features: Tensor, source: ImageSource, gallery: Gallery) -> SetMap:
    """A map of the images of the gallery whose features (n, D) are known."""
    points = viz.map_points(features)
    names = source.classes if any(label >= 0 for label in gallery.labels) else []
    colours = css_colours(len(names))
    shown = set(viz.spaced(points, *THUMBNAIL))
    places = []
    for i, (x, y) in enumerate(points.tolist()):
        label, inside = gallery.labels[i], i in shown
        known = 0 <= label < len(names)
        # A dot stands in the middle of where its thumbnail would be.
        left, top = (
            100 * (place * (1 - side) + (0 if inside else side / 2))
            for place, side in zip((x, y), THUMBNAIL, strict=True)
        )
        picture = viz.boxed(viz.to_picture(gallery.crops[i]), MAP_SIDE) if inside else None
        src = data_uri(Image.fromarray(picture)) if picture is not None else ""
        alt = f"{gallery.names[i]}: {names[label]}" if known else gallery.names[i]
        places.append(Place(gallery.names[i], left, top, colours[label] if known else "", src, alt))
    legend = list(zip(names, colours, strict=True)) if len(names) <= LEGEND else []
    return SetMap(viz.map_method("auto"), sorted(places, key=lambda place: bool(place.src)), legend)


def read_gallery(source: ImageSource, size: int) -> Gallery:
    """Images from everywhere in a source, as many as can be read in the time, and two at least.

    Raises:
        ValueError: if fewer than two can be read.
    """
    gallery, begin = Gallery(Scan(len(source))), time.monotonic()
    sample = spread(source, GALLERY)
    for i in np.random.default_rng(0).permutation(len(sample)).tolist():
        if time.monotonic() - begin > SECONDS and len(gallery.names) > SHOWN:
            break
        found = gallery.scan.look(sample, i)
        if found is None:
            continue
        image, label = found
        gallery.crops.append(center_crop(image, size, size))
        if len(gallery.images) < SHOWN:
            gallery.images.append(image)
        gallery.thumbnails.append(data_uri(thumbnail(image, SIDE)))
        gallery.names.append(sample.name(i))
        gallery.labels.append(label)
    if len(gallery.names) < 2:
        raise ValueError(
            f"{len(gallery.names)} of {len(sample)} images can be read. {gallery.scan.unreadable[:1]}"
        )
    return gallery


def facts(source: ImageSource, scan: Scan) -> list[tuple[str, str]]:
    """Facts about the images that were read, as rows of a table."""
    widths, heights = zip(*scan.sizes, strict=True)
    common, count = Counter(scan.sizes).most_common(1)[0]
    rows = [
        ("images", f"{len(source):,}, of which {scan.read:,} were read for this page"),
        ("width", f"{min(widths):,} to {max(widths):,} pixels"),
        ("height", f"{min(heights):,} to {max(heights):,} pixels"),
        ("most frequent size", f"{common[0]:,} x {common[1]:,}, {count / len(widths):.0%} of the images"),
        ("unreadable", str(len(scan.unreadable))),
        ("exact duplicates", str(len(scan.exact))),
        ("mean of each channel", ", ".join(f"{value:.3f}" for value in scan.mean)),
        ("deviation of each channel", ", ".join(f"{value:.3f}" for value in scan.std)),
    ]
    if source.classes:
        rows.append(("classes", f"{len(source.classes):,}"))
    return rows + [("unreadable", name) for name in scan.unreadable[:5]]


def _test_data(recipe: Recipe) -> dict[str, Any]:
    """The section `data` of a recipe, with the test split where training has the other one."""
    data = dict(recipe.data)
    return {**data, "split": "test"} if data.get("split") == "train" else data
