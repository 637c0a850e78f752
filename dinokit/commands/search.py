"""dinokit search index=FEATURES_OR_CURATION IMAGE ... [k=12]: similar images, as a table and a picture.

index is a folder that `dinokit extract` or `dinokit curate` wrote. The picture is out=nearest.png: a row
for each image, the query first. weights=FILE_OR_RUN says where the weights are now, if they were moved.

dinokit search index=curated photo.jpg
dinokit search weights=runs/photos index=features k=30 out=found.png a.jpg b.jpg
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, key_lines
from dinokit.config.load import parse_overrides, section_values
from dinokit.config.registry import check_at_least

if TYPE_CHECKING:
    from dinokit.data.sources import ImageLike


RENAMED = {"sheet": "out"}


@dataclass
class Config:
    index: str = "???"  # a folder that `dinokit extract` or `dinokit curate` wrote
    weights: str = ""  # empty: the path that the index names
    k: int = 12  # images found for each image
    out: str = ""  # the picture; empty: nearest.png, or nearest_2.png, ... if that exists
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one

    def __post_init__(self) -> None:
        check_at_least(self, k=1)


def run(command: Command) -> dict[str, Any]:
    cfg = Config(**section_values("commands", "search", parse_overrides(command.settings), ""))
    if not command.words:
        raise ValueError("Which image? Give one or more files: dinokit search index=FOLDER photo.jpg")
    from PIL import Image, ImageOps

    from dinokit.curate.image_sets import ImageSearch, contact_sheet
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.files import atomic, unused
    from dinokit.weights import load_backbone

    index = ImageSearch(Path(cfg.index))
    backbone = load_backbone(cfg.weights or index.weights).to(pick_device(cfg.device))
    similarity, found = index.search(index.embed(backbone, command.words), cfg.k)
    tiles: list[tuple[ImageLike | None, str]] = []
    result: dict[str, list[dict[str, Any]]] = {}
    for file, values, numbers in zip(command.words, similarity.tolist(), found.tolist(), strict=True):
        print(f"{file}\n rank  similarity  image")
        tiles.append((ImageOps.exif_transpose(Image.open(file)), Path(file).name))
        hits = [(value, number) for value, number in zip(values, numbers, strict=True) if number >= 0]
        result[file] = [{"image": index.name(number), "similarity": value} for value, number in hits]
        for rank, (value, number) in enumerate(hits, 1):
            print(f"{rank:5}  {value:10.4f}  {index.name(number)}")
            tiles.append((index.picture(number), f"{rank}: {value:.4f}"))
        tiles += [(None, "")] * (cfg.k - len(hits))
    out = cfg.out or str(unused(Path("nearest.png")))
    with atomic(out) as temporary, temporary.open("wb") as picture:
        contact_sheet(tiles, columns=cfg.k + 1).save(picture, "PNG")
    print(json.dumps({"images": len(command.words), "out": out}))
    return {"out": out, "found": result}


def describe(words: list[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "search")])
