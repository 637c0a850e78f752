"""manifest.csv: the training set, an image a line, with where it came from; data.name=manifest reads it."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinokit.curate.seeds import Config as Seeds
from dinokit.curate.sets import ImageSet
from dinokit.curate.stages import key_of
from dinokit.runtime.files import atomic

HEADER = ("path", "from", "rule", "query", "rank", "similarity", "cluster")


def write_manifest(
    out: Path, picks: np.ndarray, origins: list[str], pool: ImageSet, seeds: Mapping[str, ImageSet],
    kept: Mapping[str, np.ndarray],
    rules: Mapping[str, Seeds],
) -> dict[str, Any]:  # fmt: skip
    """Write it, and as OUT/images/*.png those images that are not files.

    Args:
        out: the curation's folder.
        picks: PICKs.
        origins: what their `origin` numbers.
        pool: where they are from.
        seeds: by name.
        kept: by name, numbers of those seeds that go in as they are.
        rules: by name.
    """
    names = {name: _Names(out, one) for name, one in {"pool": pool, **seeds}.items()}
    counts: dict[str, int] = {}
    with (
        atomic(out / "manifest.csv") as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADER)
        for name, images in kept.items():
            for number in images.tolist():
                table.writerow([names[name].path(number), f"seeds.{name}", "seed", "", "", "", ""])
            counts[f"seeds_of_{name}"] = len(images)
        for image, origin, query, rank, similarity, cluster in picks.tolist():
            name = origins[origin]
            rule = rules[name].rule if name in rules else name
            who = seeds[name].name(query) if query >= 0 else ""
            told = [who, rank, f"{similarity:.4f}"] if who else ["", "", ""]
            table.writerow(
                [names["pool"].path(image), f"seeds.{name}" if who else "pool", rule, *told, cluster]
            )
    return {"images": len(picks) + sum(counts.values()), "of_the_pool": len(picks), **counts}


class _Names:
    """Paths of a set's images, made into files where they are none."""

    def __init__(self, out: Path, one: ImageSet) -> None:
        self.one, self.folder = one, out / "images" / f"{one.label}.{key_of(one.stamp())}"
        self.files = one.source is None or hasattr(one.source, "file")

    def path(self, number: int) -> str:
        """Of the file."""
        name = self.one.name(number)
        if self.files:
            return name if name.startswith("row ") else str(Path(name).absolute())
        path = self.folder / f"{number:09d}.png"
        if not path.exists():
            picture = self.one.picture(number)
            with atomic(path) as part, part.open("wb") as file:
                _image(picture).save(file, "PNG")
        return str(path.absolute())


def _image(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype != np.uint8 or picture.shape[2] not in (1, 3):
        raise ValueError(
            f"An image of {picture.dtype} with {picture.shape[2]} channels is not to be had as a PNG: curate "
            f"a folder or a manifest of files, which stay where they are."
        )
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
