"""dinokit search index=FEATURES_OR_CURATION IMAGE_OR_FOLDER ...: find similar images.

index is a folder that `dinokit extract` or `dinokit curate` wrote. The picture is out=nearest.png: a row
for each image, the query first. weights=FILE_OR_RUN says where the weights are now, if they were moved.

With align=RUN of `dinokit align` the queries are texts, and the images are those of data.path=FOLDER, or of
data.name and what that takes: each is encoded once for all texts of the command.

dinokit search index=curated photo.jpg
dinokit search weights=runs/photos index=features k=30 out=found.png a.jpg b.jpg
dinokit search weights=runs/photos align=runs/aligned data.path=PHOTOS "a red disc" "a cross above a square"
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, image_files, key_lines
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least
from dinokit.config.values import with_source
from dinokit.runtime.files import check_target

if TYPE_CHECKING:
    from dinokit.data.sources import ImageLike


RENAMED = {"sheet": "out"}


@dataclass
class Config:
    index: str = ""  # a folder that `dinokit extract` or `dinokit curate` wrote
    weights: str = ""  # empty: the path that the index names
    align: str = ""  # a run of dinokit align on these weights: the words of the command are texts
    # with align: the images to find
    data: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources"})
    k: int = 12  # images found for each image or text
    out: str = ""  # the picture, a .png; empty: nearest.png, or nearest_2.png, ... if that exists
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one

    def __post_init__(self) -> None:
        check_at_least(self, k=1)
        if self.align and not (self.weights and self.data):
            raise ValueError("align=RUN needs the weights=FILE_OR_RUN of its training and data.path=FOLDER.")
        if bool(self.align) == bool(self.index) or (self.index and self.data):
            raise ValueError(
                "Give index=FOLDER, which dinokit extract or dinokit curate wrote, and images; or align=RUN, "
                "data.path=FOLDER and texts."
            )
        if self.out and Path(self.out).suffix.lower() != ".png":
            raise ValueError(
                f"out={self.out}: out is the picture, a .png. The table is printed; --json prints it as an "
                f"object."
            )


def run(command: Command) -> dict[str, Any]:
    values = parse_overrides(command.settings)
    if isinstance(values.get("data"), dict):
        values["data"] = with_source(values["data"])
    cfg = Config(**checked_values(Config, values))
    if not command.words:
        kind, example = ("text", '"a red disc"') if cfg.align else ("image", "index=FOLDER photo.jpg")
        raise ValueError(f"Which {kind}? Give one or several: dinokit search ... {example}")
    if cfg.out:
        check_target(cfg.out)
    return _by_text(cfg, command.words) if cfg.align else _by_image(cfg, command.words)


def _by_image(cfg: Config, words: list[str]) -> dict[str, Any]:
    from dinokit.curate.image_sets import ImageSearch
    from dinokit.data.sources.memory import as_source
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.files import printable
    from dinokit.weights import load_backbone

    files, index = image_files(words), ImageSearch(Path(cfg.index))
    backbone = load_backbone(cfg.weights or index.weights).to(pick_device(cfg.device))
    similarity, found = index.search(index.embed(backbone, files), cfg.k)
    source = as_source(files, backbone.channels)
    tiles: list[tuple[ImageLike | None, str]] = []
    result: dict[str, list[dict[str, Any]]] = {}
    for i, (file, values, numbers) in enumerate(zip(files, similarity.tolist(), found.tolist(), strict=True)):
        print(f"{printable(file)}\n rank  similarity  image")
        tiles.append((source[i][0], printable(Path(file).name)))
        hits = [(value, number) for value, number in zip(values, numbers, strict=True) if number >= 0]
        result[file] = [{"image": index.name(number), "similarity": value} for value, number in hits]
        for rank, (value, number) in enumerate(hits, 1):
            print(f"{rank:5}  {value:10.4f}  {printable(index.name(number))}")
            tiles.append((index.picture(number), f"{rank}: {value:.4f}"))
        tiles += [(None, "")] * (cfg.k - len(hits))
    out = _save(cfg, tiles)
    print(json.dumps({"images": len(files), "out": out}))
    return {"out": out, "found": result}


def _by_text(cfg: Config, texts: list[str]) -> dict[str, Any]:
    """The images whose vectors are nearest to each text."""
    import torch

    from dinokit.data.sources.memory import as_source
    from dinokit.language.aligned import BATCH, load_aligned
    from dinokit.runtime.files import printable
    from dinokit.runtime.log import watch

    aligned = load_aligned(cfg.align, cfg.weights, cfg.device)
    source = as_source(cfg.data, aligned.frozen_tokens.backbone.channels)
    starts = range(0, len(source), BATCH)
    rows = [
        aligned.image([source[i][0] for i in range(start, min(start + BATCH, len(source)))])
        for start in watch(starts, len(starts), "images")
    ]
    cosine = aligned.text(texts) @ torch.cat(rows).T
    tiles: list[tuple[ImageLike | None, str]] = []
    result: dict[str, list[dict[str, Any]]] = {}
    for text, row in zip(texts, cosine, strict=True):
        found = row.topk(min(cfg.k, len(source)))
        hits = [*zip(found.values.tolist(), found.indices.tolist(), strict=True)]
        print(f"{printable(text)}\n rank  similarity  image")
        tiles.append((None, text))
        result[text] = [{"image": source.name(number), "similarity": value} for value, number in hits]
        for rank, (value, number) in enumerate(hits, 1):
            print(f"{rank:5}  {value:10.4f}  {printable(source.name(number))}")
            tiles.append((source[number][0], f"{rank}: {value:.4f}"))
        tiles += [(None, "")] * (cfg.k - len(hits))
    out = _save(cfg, tiles)
    print(json.dumps({"texts": len(texts), "images": len(source), "out": out}))
    return {"out": out, "found": result}


def _save(cfg: Config, tiles: "list[tuple[ImageLike | None, str]]") -> str:
    """The picture of queries and what was found."""
    from dinokit.curate.image_sets import contact_sheet
    from dinokit.runtime.files import atomic, unused

    out = cfg.out or str(unused(Path("nearest.png")))
    with atomic(out) as temporary, temporary.open("wb") as picture:
        contact_sheet(tiles, columns=cfg.k + 1).save(picture, "PNG")
    return out


def describe(words: list[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "search")])
