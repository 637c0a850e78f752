"""Single pictures of a page, and those of segmentation and depth beside the truth."""

import io
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image

from dinokit import viz
from dinokit.data.predictions import Predictions, Sample

UNKNOWN = (128, 128, 128)  # of pixels that are not evaluated, or have no depth


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


def css_colours(count: int) -> list[str]:
    """class_colours() as a style sheet writes them."""
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in viz.class_colours(count)]


@dataclass
class DenseSection:
    """Predictions of one evaluation beside the truth."""

    name: str  # of the evaluation
    text: str
    legend: list[tuple[str, str]]  # classes that occur, and their colours
    rows: list[list[Tile]]  # of each image: image, truth, prediction


def dense_section(path: Path) -> DenseSection:
    """The predictions that an evaluation left in a file.

    Raises:
        ValueError, OSError: as Predictions.read().
    """
    found = Predictions.read(path)
    rows: list[list[Tile]] = []
    for sample in found.samples:
        pictures = _classes(found, sample) if found.classes else _depths(sample)
        image, short = data_uri(Image.fromarray(sample.image)), PurePath(sample.name).name
        tiles = [Tile(sample.name, "image", image, short=short, alt=sample.name)]
        for caption, picture in zip(("truth", "predicted"), pictures, strict=True):
            alt = f"{sample.name}: {caption}"
            tiles.append(Tile(sample.name, caption, data_uri(picture), alt=alt, sharp=True))
        rows.append(tiles)
    if not found.classes:
        text = "Near is dark, far is bright, in the range of the true depths of an image. Grey: no reading."
        return DenseSection(path.parent.name, text, [], rows)
    maps = [part for sample in found.samples for part in (sample.truth, sample.predicted)]
    occurring = sorted({int(i) for part in maps for i in np.unique(part) if 0 <= i < len(found.classes)})
    colours = css_colours(len(found.classes))
    legend = [(found.classes[i], colours[i]) for i in occurring]
    return DenseSection(path.parent.name, "Classes of pixels. Grey: not evaluated.", legend, rows)


def _classes(found: Predictions, sample: Sample) -> list[viz.Picture]:
    """Class ids as colours."""
    colours = np.array([*viz.class_colours(len(found.classes)), UNKNOWN], np.uint8)
    maps = [np.nan_to_num(part, nan=-1).astype(int) for part in (sample.truth, sample.predicted)]
    return [colours[np.where((part >= 0) & (part < len(found.classes)), part, -1)] for part in maps]


def _depths(sample: Sample) -> list[viz.Picture]:
    """Metres as colours, both in the range of the true ones."""
    known = sample.truth > 0
    depths = sample.truth[known] if known.any() else np.array([0.0, 1.0])
    low, high = float(depths.min()), float(depths.max())
    scaled = [(part - low) / max(high - low, 1e-6) for part in (sample.truth, sample.predicted)]
    truth, predicted = (viz.heat(torch.from_numpy(np.nan_to_num(part))) for part in scaled)
    return [np.where(known[..., None], truth, np.array(UNKNOWN, np.uint8)), predicted]
