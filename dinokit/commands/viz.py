"""dinokit viz PICTURE weights=RUN [IMAGE_OR_FOLDER ...] [key=value ...]: draw images and features to a PNG.

pca         patch features as colours: similar patches have similar colours; beside it the foreground alone
attention   where each head of the last block looks from the class token
similarity  cosine of every patch with the patch at point=[across,down] (shares of 1) of the first image
neighbours  the most similar images to each of the first `queries` ones, among all that are given
crops       crops, colours and masks of the first step of a run: dinokit viz crops weights=RUN

Without images those that the run was trained on are drawn. Of a folder, `count` images are drawn.

dinokit viz pca weights=runs/photos PHOTOS
dinokit viz similarity weights=runs/photos a.jpg b.jpg point=[0.4,0.6] out=same.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit import evaluation
from dinokit.commands import Command, key_lines
from dinokit.config import registry
from dinokit.config.load import load_recipe, parse_overrides, section_values
from dinokit.config.registry import check_at_least

if TYPE_CHECKING:
    from dinokit.data.sources import ImageLike
    from dinokit.models import Backbone
    from dinokit.viz import Picture

PICTURES = ("pca", "attention", "similarity", "neighbours", "crops")
SIDE = 224  # pixels of a tile at most


@dataclass
class Config:
    weights: str = "???"  # whatever load_backbone() reads; a run for crops
    out: str = ""  # the PNG; empty: PICTURE.png, or PICTURE_2.png, ... if that exists
    size: int = 0  # pixels of the longer side that the backbone sees; 0: as trained, or 16 patches
    count: int = 12  # images that are drawn; neighbours: 400 are searched if this is not larger
    queries: int = 6  # rows of neighbours
    k: int = 7  # neighbours of each
    block: int = -1  # of attention; -1: the last one
    point: tuple[float, float] = (0.5, 0.5)  # of similarity: across and down, as shares of the first image
    device: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(self, size=0, count=1, queries=1, k=1)
        if not all(0 <= share <= 1 for share in self.point):
            raise ValueError(f"point={list(self.point)}: across and down are shares of the image, 0 to 1.")


def run(command: Command) -> dict[str, Any]:
    kind, *places = command.words or [""]
    if kind not in PICTURES:
        near = registry.suggest(kind, list(PICTURES))
        raise ValueError(f"Which picture? There is no '{kind}'.{near} There is: {', '.join(PICTURES)}.")
    cfg = Config(**section_values("commands", "viz", parse_overrides(command.settings), ""))
    from PIL import Image

    from dinokit.runtime.files import atomic, unused

    if kind == "crops":
        sheet = _crops(cfg)
    else:
        backbone = evaluation.load_evaluated(cfg.weights, None, cfg.device)
        count = max(cfg.count, 400) if kind == "neighbours" else cfg.count
        sheet = _sheet(kind, cfg, backbone, _images(places, cfg, count, backbone.channels))
    out = cfg.out or str(unused(Path(f"{kind}.png")))
    with atomic(out) as temporary, temporary.open("wb") as file:
        Image.fromarray(sheet).save(file, "PNG")
    print(out)
    return {"out": out}


def _crops(cfg: Config) -> "Picture":
    from dinokit import viz

    recipe = load_recipe(Path(cfg.weights) / "recipe.yaml" if Path(cfg.weights).is_dir() else cfg.weights)
    return viz.crops(recipe, registry.build("data.sources", recipe.data), images=min(cfg.count, 4))


def _images(places: Sequence[str], cfg: Config, count: int, channels: int) -> "list[ImageLike]":
    """Images of files and folders, or of the run's own data.

    Raises:
        ValueError, LookupError: if there is none, or one cannot be read.
    """
    from dinokit.data.decode import decode
    from dinokit.features.extract import spread
    from dinokit.runtime.files import read_regular

    sections: list[dict[str, Any]] = [
        {"name": "folder", "path": place, "channels": channels} for place in places if Path(place).is_dir()
    ]
    if not places:
        data = evaluation.training_data(cfg.weights)
        if data is None:
            raise ValueError(
                f"{cfg.weights} does not say which images it was trained on: name files or folders."
            )
        sections = [data]
    images = [decode(read_regular(place), place, channels) for place in places if not Path(place).is_dir()]
    for section in sections:
        source = spread(registry.build("data.sources", section), count)
        images += [source[index][0] for index in range(len(source))]
    return images[: max(count, len(places))]


def _sheet(kind: str, cfg: Config, backbone: "Backbone", images: "list[ImageLike]") -> "Picture":
    from dinokit import viz

    if kind == "neighbours":
        return _neighbours(cfg, backbone, images)
    shown = [viz.to_picture(viz.fit(backbone, image, cfg.size)) for image in images]
    if kind == "attention":
        maps = viz.attention(backbone, images, cfg.size, cfg.block)
        rows = [[picture, *heads] for picture, heads in zip(shown, maps, strict=True)]
    elif kind == "similarity":
        pictures = viz.similarity(backbone, images, cfg.point, cfg.size)
        shown[0] = viz.marked(shown[0], cfg.point)
        rows = [list(pair) for pair in zip(shown, pictures, strict=True)]
    else:
        features = viz.patch_features(backbone, [viz.fit(backbone, image, cfg.size) for image in images])
        colours, front = (viz.component_colours(features, foreground) for foreground in (False, True))
        rows = [list(row) for row in zip(shown, colours, front, strict=True)]
    return viz.grid([[viz.boxed(picture, SIDE) for picture in row] for row in rows])


def _neighbours(cfg: Config, backbone: "Backbone", images: "list[ImageLike]") -> "Picture":
    import numpy as np
    import torch

    from dinokit import viz
    from dinokit.data.transforms import center_crop
    from dinokit.features import device_of, frozen, normalised

    if len(images) < 2:
        raise ValueError(f"{len(images)} image has no neighbours: give a folder.")
    size = cfg.size or backbone.input.size
    rows, tiles = [], []
    with frozen(backbone), torch.inference_mode():
        for image in images:
            crop = center_crop(image, size, size)
            tiles.append(viz.boxed(viz.to_picture(crop), SIDE // 2))
            rows.append(
                backbone([normalised(backbone, crop[None].to(device_of(backbone)))], [None])[0].cls[0].cpu()
            )
    queries = [i * len(images) // cfg.queries for i in range(min(cfg.queries, len(images)))]
    return viz.neighbours(np.stack(tiles), torch.stack(rows), queries, min(cfg.k, len(images) - 1))


def words() -> Sequence[str]:
    return PICTURES


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "viz")])
