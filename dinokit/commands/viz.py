"""dinokit viz PICTURE weights=RUN [IMAGE_OR_FOLDER ...] [key=value ...]: draw images and features.

pca         patch features as colours: similar patches have similar colours; beside it the foreground alone,
            if the first component separates it from the background
attention   where each head of the last block looks from the class token
similarity  cosine of every patch with the patch at point=[across,down] (shares of 1) of the first image;
            black is the lowest one in these images, the brightest 1
neighbours  the most similar images to each of the first `queries` ones, among all that are given
map         all images in two dimensions: similar ones are near each other
crops       crops, colours and masks of the first step of a run: dinokit viz crops weights=RUN

Without images those that the run was trained on are drawn. Of folders, `count` images are drawn.

pca, attention and similarity also draw the frames of a video (MP4 and others, read by PyAV: pip install av),
of an animated GIF, WebP or PNG file, or of a folder of frames, in the order of their names, if `out` is
NAME.webp or NAME.gif. The result is an animation.

dinokit viz pca weights=runs/photos PHOTOS
dinokit viz similarity weights=runs/photos a.jpg b.jpg point=[0.4,0.6] out=same.png
dinokit viz pca weights=runs/photos clip.mp4 out=clip.webp
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dinokit import evaluation
from dinokit.commands import Command, key_lines
from dinokit.config import registry
from dinokit.config.load import checked_values, load_recipe, parse_overrides
from dinokit.config.registry import check_at_least, only_if

if TYPE_CHECKING:
    from dinokit.data.sources import ImageLike
    from dinokit.models import Backbone
    from dinokit.viz import Picture

PICTURES = ("pca", "attention", "similarity", "neighbours", "map", "crops")
DRAWN = ("pca", "attention", "similarity", "neighbours", "map")  # with a backbone
ANIMATED = ("pca", "attention", "similarity")
WRITTEN = (".png", ".webp", ".gif")
SIDE, THUMBNAIL = 224, 64  # pixels of a tile at most, and of an image on a map
COUNT, SET, FRAMES = 12, 400, 100  # images that are drawn, and of a set; frames


@dataclass
class Config:
    weights: str = "???"  # whatever load_backbone() reads; a run for crops
    out: str = ""  # NAME.png, .webp or .gif; empty: PICTURE.png, or PICTURE_2.png, ... if that exists
    # pixels of the longer side that the backbone sees; 0: as trained, or 16 patches
    size: int = only_if(0, picture=DRAWN)
    # images of folders or of the run, or frames of a video; 0: 12 images, 400 for neighbours and map,
    # 4 for crops, which has no more; 100 frames
    count: int = 0
    queries: int = only_if(6, picture=("neighbours",))  # rows
    k: int = only_if(7, picture=("neighbours",))  # neighbours of each
    method: Literal["auto", "tsne", "pca"] = only_if("auto", picture=("map",))  # auto: tsne, if it can be
    # file of the components: written if there is none, else used, for the same colours
    basis: str = only_if("", picture=("pca",))
    fps: float = only_if(0.0, picture=ANIMATED)  # frames a second; 0: as the video, 10 of a folder
    block: int = only_if(-1, picture=("attention",))  # -1: the last one
    # across and down, as shares of the first image
    point: tuple[float, float] = only_if((0.5, 0.5), picture=("similarity",))
    device: str = "auto"
    picture: str = ""  # what to draw, as the word after viz

    def __post_init__(self) -> None:
        check_at_least(self, size=0, count=0, queries=1, k=1, fps=0)
        if self.out and Path(self.out).suffix.lower() not in WRITTEN:
            raise ValueError(f"out={self.out}: it is written as NAME.png, NAME.webp or NAME.gif.")
        if not all(0 <= share <= 1 for share in self.point):
            raise ValueError(f"point={list(self.point)}: across and down are shares of the image, 0 to 1.")


@dataclass
class Images:
    """What is drawn."""

    images: "list[ImageLike]" = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # -1: none
    fps: float = 0.0  # of a video; 0: these are separate images


def run(command: Command) -> dict[str, Any]:
    given = parse_overrides(command.settings)
    words = [str(given.pop("picture")), *command.words] if "picture" in given else command.words
    kind, *places = words or [""]
    if kind not in PICTURES:
        none = f" There is no '{kind}'.{registry.suggest(kind, [*PICTURES])}" if kind else ""
        raise ValueError(f"Which picture?{none} There is: {', '.join(PICTURES)}.")
    cfg = Config(**checked_values(Config, {**given, "picture": kind}))
    from dinokit import viz
    from dinokit.data.files import existing
    from dinokit.runtime.files import unused

    if kind == "crops":
        if places:
            raise ValueError(f"viz crops draws images of the run itself, not {places[0]}.")
        frames, fps = [_crops(cfg)], 0.0
    else:
        for place in places:
            existing(place)
        backbone = evaluation.load_evaluated(cfg.weights, None, cfg.device)
        images = _images(kind, places, cfg, backbone.channels)
        if cfg.fps and not images.fps:
            raise ValueError(f"fps={cfg.fps:g}: these are images, not a video. Give out=NAME.webp.")
        frames, fps = _draw(kind, cfg, backbone, images), cfg.fps or images.fps
    out = cfg.out or str(unused(Path(f"{kind}.webp" if len(frames) > 1 else f"{kind}.png")))
    viz.write_animation(out, frames, fps or viz.FPS)
    print(out)
    return {"out": out}


def _crops(cfg: Config) -> "Picture":
    from dinokit import viz

    run = Path(cfg.weights) / "recipe.yaml"
    recipe = load_recipe(run, of_run=True) if run.is_file() else load_recipe(cfg.weights)
    return viz.crops(recipe, registry.build("data.sources", recipe.data), images=min(cfg.count or 4, 4))


def _images(kind: str, places: Sequence[str], cfg: Config, channels: int) -> Images:
    """Images of files and folders, frames of a video, or images of the run's own data.

    Raises:
        ValueError, LookupError: if there is none, or one cannot be read.
    """
    from dinokit import viz

    files = [place for place in places if not Path(place).is_dir()]
    videos = [place for place in files if viz.is_animated(place)]
    animated = Path(cfg.out).suffix.lower() in (".gif", ".webp")
    if not videos and not animated:
        return _separate_images(kind, places, cfg, channels)
    if kind not in ANIMATED:
        raise ValueError(f"viz {kind} draws images, not a video: {', '.join(ANIMATED)} draw videos.")
    if len(places) != 1:
        raise ValueError(
            f"An animation is of one video, an animated file or a folder of frames; there are {len(places)}."
        )
    count = cfg.count or FRAMES
    if videos:
        frames, fps = viz.read_frames(videos[0], channels, count)
    else:
        source = registry.build("data.sources", {"name": "folder", "path": places[0], "channels": channels})
        frames = [source[index][0] for index in viz.evenly(len(source), count)]
        fps = viz.FPS * len(frames) / len(source)
    return Images(frames, [-1] * len(frames), fps)


def _separate_images(kind: str, places: Sequence[str], cfg: Config, channels: int) -> Images:
    from dinokit.data.decode import decode
    from dinokit.features.extract import spread
    from dinokit.runtime.files import read_regular

    count = cfg.count or (SET if kind in ("neighbours", "map") else COUNT)
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
    found = Images([decode(read_regular(p), p, channels) for p in places if not Path(p).is_dir()])
    found.labels = [-1] * len(found.images)
    for section in sections:
        source = spread(registry.build("data.sources", section), count)
        for image, label in (source[index] for index in range(len(source))):
            found.images.append(image)
            found.labels.append(label if len(places) < 2 else -1)  # folders number their classes apart
    most = max(count, len(places))
    return Images(found.images[:most], found.labels[:most])


def _draw(kind: str, cfg: Config, backbone: "Backbone", drawn: Images) -> "list[Picture]":
    """One sheet, or the frames of a video."""
    from dinokit import viz

    images = drawn.images
    if kind == "neighbours":
        return [_neighbours(cfg, backbone, images)]
    if kind == "map":
        return [_map(cfg, backbone, drawn)]
    shown = [viz.to_picture(viz.fit(backbone, image, cfg.size)) for image in images]
    if kind == "attention":
        maps = viz.attention(backbone, images, cfg.size, cfg.block)
        rows = [[picture, *heads] for picture, heads in zip(shown, maps, strict=True)]
    elif kind == "similarity":
        pictures = viz.similarity(backbone, images, cfg.point, cfg.size)
        shown[0] = viz.marked(shown[0], cfg.point)
        rows = [list(pair) for pair in zip(shown, pictures, strict=True)]
    else:
        rows = _components(cfg, backbone, images, shown)
    tiles = [[viz.boxed(picture, SIDE) for picture in row] for row in rows]
    return [viz.grid([row]) for row in tiles] if drawn.fps else [viz.grid(tiles)]


def _components(
    cfg: Config, backbone: "Backbone", images: "list[ImageLike]", shown: "list[Picture]"
) -> "list[list[Picture]]":
    """Rows of images and their principal components, of the foreground too, if it is apart."""
    from dinokit import viz

    features = viz.patch_features(backbone, [viz.fit(backbone, image, cfg.size) for image in images])
    if cfg.basis and Path(cfg.basis).exists():
        basis = viz.Basis.load(cfg.basis, backbone.width)
    else:
        basis = viz.Basis.fit(features)
        if cfg.basis:
            basis.save(cfg.basis)
    columns = [shown, basis.colours(features)]
    if basis.separates(features):
        columns.append(basis.colours(features, foreground=True))
    else:
        print("The first component does not separate a foreground here: no picture of it.", file=sys.stderr)
    return [list(row) for row in zip(*columns, strict=True)]


def _neighbours(cfg: Config, backbone: "Backbone", images: "list[ImageLike]") -> "Picture":
    import numpy as np

    from dinokit import viz

    if len(images) < 2:
        raise ValueError(f"{len(images)} image has no neighbours: give a folder.")
    crops = viz.centres(backbone, images, cfg.size)
    tiles = [viz.boxed(viz.to_picture(crop), SIDE // 2) for crop in crops]
    features = viz.class_tokens(backbone, crops)
    queries = [i * len(images) // cfg.queries for i in range(min(cfg.queries, len(images)))]
    return viz.neighbours(np.stack(tiles), features, queries, min(cfg.k, len(images) - 1))


def _map(cfg: Config, backbone: "Backbone", drawn: Images) -> "Picture":
    import numpy as np

    from dinokit import viz

    crops = viz.centres(backbone, drawn.images, cfg.size)
    points = viz.map_points(viz.class_tokens(backbone, crops), cfg.method)
    tiles = [viz.boxed(viz.to_picture(crop), THUMBNAIL) for crop in crops]
    return viz.map_picture(np.stack(tiles), points, drawn.labels if max(drawn.labels) >= 0 else None)


def words() -> Sequence[str]:
    return PICTURES


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "viz")])
