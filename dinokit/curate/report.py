"""Writes the results of a curation: manifest.csv, which data.name=manifest reads, and report.html."""

import csv
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from dinokit.curate.clustering import entropy
from dinokit.curate.dedup import REASONS, Status, groups, load_status
from dinokit.curate.image_sets import ImageSet, key_of
from dinokit.curate.retrieve import ALL, BALANCE, origins
from dinokit.curate.settings import Config, Seeds
from dinokit.data.transforms import thumbnail
from dinokit.report import render
from dinokit.report.tiles import Tile, data_uri
from dinokit.runtime.files import atomic, file_cell, write_text

HEADER = ("path", "from", "rule", "query", "rank", "similarity", "cluster")
SIDE = 112  # pixels of a picture
ROW = 8  # pictures in a row
BARS = 200  # bars of a diagram at most
Rows = Iterator[tuple[str, list[Tile]]]  # the title and the pictures of each row


def write_manifest(
    out: Path,
    selected: np.ndarray,
    pool: ImageSet,
    seeds: Mapping[str, ImageSet],
    included: Mapping[str, np.ndarray],
    rules: Mapping[str, Seeds],
) -> dict[str, Any]:
    """Write manifest.csv, a line an image, and OUT/images/*.png of the images that are not files.

    Args:
        out: the folder of the curation.
        selected: SELECTED images of the pool.
        pool: the pool.
        seeds: by name.
        included: by name, the seeds that are part of the training set themselves.
        rules: by name.
    """
    files = {name: _ImageFiles(out, image_set) for name, image_set in {"pool": pool, **seeds}.items()}
    counts, names = {f"seeds_of_{name}": len(images) for name, images in included.items()}, origins(rules)
    with (
        atomic(out / "manifest.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADER)
        for name, images in included.items():
            for number in images.tolist():
                table.writerow([files[name].path(number), f"seeds.{name}", "seed", "", "", "", ""])
        for image, origin, query, rank, similarity, cluster in selected.tolist():
            name = names[origin]
            rule = rules[name].rule if name in rules else name
            path = files["pool"].path(image)
            if query >= 0:
                seed = file_cell(seeds[name].name(query))
                row = [f"seeds.{name}", rule, seed, rank, f"{similarity:.4f}", cluster]
            else:
                row = ["pool", rule, "", "", "", cluster]
            table.writerow([path, *row])
    return {"images": len(selected) + sum(counts.values()), "of_the_pool": len(selected), **counts}


class _ImageFiles:
    """Files of the images of a set; an image that is not a file is written as a PNG."""

    def __init__(self, out: Path, image_set: ImageSet) -> None:
        self.image_set = image_set
        self.folder = out / "images" / f"{image_set.label}.{key_of(image_set.stamp())}"
        self.has_files = image_set.source is None or hasattr(image_set.source, "file")

    def path(self, number: int) -> str:
        """The path of an image's file."""
        name = self.image_set.name(number)
        if self.has_files:
            return name if name.startswith("row ") else str(Path(name).absolute())
        path = self.folder / f"{number:09d}.png"
        if not path.exists():
            picture = self.image_set.picture(number)
            with atomic(path) as temporary, temporary.open("wb") as file:
                _to_pil(picture).save(file, "PNG")
        return str(path.absolute())


def _to_pil(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype != np.uint8 or picture.shape[2] not in (1, 3):
        raise ValueError(
            f"An image of {picture.dtype} with {picture.shape[2]} channels cannot be written as a PNG. Use "
            f"a folder or a manifest of files as the pool: these files are not copied."
        )
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


@dataclass
class ReportData:
    """What the report is made of."""

    cfg: Config
    sets: Mapping[str, ImageSet]
    origins: list[str]
    figures: Mapping[str, Mapping[str, Any]]  # by stage
    folders: Mapping[str, Path]  # by stage


def write_report(path: Path, data: ReportData) -> dict[str, Any]:
    """Write report.html: what each stage removed or selected and why, with pictures."""
    label = load_status(data.folders["dedup"], "groups.npz")["label"]
    overlap = load_status(data.folders["overlap"])
    status, shown = overlap["status"], overlap["shown"]
    cluster = np.load(data.folders["clusters"] / "clusters.npz")["cluster"]
    selected = np.load(data.folders["retrieve"] / "selection.npy")
    stages = [
        (name, values.get("seconds", ""), in_words({k: v for k, v in values.items() if k != "seconds"}))
        for name, values in data.figures.items()
    ]
    text = render(
        "curation.html",
        title=f"Curation {data.cfg.out}",
        funnel=_funnel(status, selected, data),
        stages=stages,
        cluster_sizes=_cluster_sizes(status, cluster, selected),
        group_count=len(groups(label)[1]) - 1,
        group_rows=_groups(status, label, data),
        overlap_count=len(shown),
        overlap_rows=_overlaps(shown, data),
        query_rows=list(_queries(selected, data)),
        cluster_count=len(np.unique(selected["cluster"])),
        cluster_rows=_clusters(selected, data),
    )
    write_text(path, text)
    return {"bytes": path.stat().st_size}


def _funnel(status: np.ndarray, selected: np.ndarray, data: ReportData) -> list[tuple[str, int, int | str]]:
    """Rows of a table: what, images, images left."""
    left = len(status)
    rows: list[tuple[str, int, int | str]] = [("images in the pool", left, left)]
    for kind, reason in REASONS.items():
        removed = int((status == kind).sum())
        left -= removed
        rows.append((reason, -removed, left))
    rows.append(("not retrieved by seeds, nor drawn by balance", len(selected) - left, len(selected)))
    counts = np.bincount(selected["origin"], minlength=len(data.origins))
    how = {BALANCE: "drawn evenly over hierarchical clusters", ALL: "all that were left"}
    for name, count in zip(data.origins, counts.tolist(), strict=True):
        if count:
            rows.append((f"of these {how.get(name, f'retrieved by seeds.{name}')}", count, ""))
    return rows


def _cluster_sizes(
    status: np.ndarray, cluster: np.ndarray, selected: np.ndarray
) -> Iterator[tuple[str, int, float, list[float]]]:
    """Rows for the embedded images, the clean pool and the training set: name, images, entropy, bars.

    With many clusters, each bar is the mean of several sizes.
    """
    clean = cluster[(status == Status.CLEAN) & (cluster >= 0)]
    for name, numbers in (
        ("embedded", cluster[cluster >= 0]),
        ("without duplicates and evaluation images", clean),
        ("training set", selected["cluster"]),
    ):
        sizes = np.bincount(numbers, minlength=int(cluster.max()) + 1)
        ordered = np.sort(sizes)[::-1].astype(np.float64)
        bars = [float(some.mean()) for some in np.array_split(ordered, min(BARS, len(ordered)))]
        yield name, int(sizes.sum()), entropy(sizes), bars


def _groups(status: np.ndarray, label: np.ndarray, data: ReportData) -> Rows:
    """The largest groups, then as many at even steps down to the smallest."""
    members, starts = groups(label)
    order = np.argsort(-np.diff(starts), kind="stable")
    first = min(data.cfg.gallery // 2, len(order) - 1)
    steps = np.linspace(first, len(order) - 1, data.cfg.gallery - data.cfg.gallery // 2).astype(int)
    for number in order[np.unique([*range(first), *steps])] if len(order) else ():
        images = members[starts[number] : starts[number + 1]]
        images = images[np.lexsort((images, status[images]))]
        tiles = [_tile(data.sets["pool"], i, Status(status[i]).name.lower()) for i in images[:ROW]]
        yield f"{len(images)} images", tiles


def _overlaps(shown: np.ndarray, data: ReportData) -> Rows:
    """Matches of images of the pool with evaluation images."""
    against = [label for label in data.sets if label.startswith("against.")]
    order = np.argsort(shown[:, 3], kind="stable")  # the least similar first: mistakes are most likely there
    for place in order[_even_steps(len(order), data.cfg.gallery)]:
        image, number, other, similarity = shown[place]
        label = against[int(number)]
        tiles = [_tile(data.sets["pool"], image, "pool"), _tile(data.sets[label], other, label)]
        yield f"similarity {similarity:.3f}", tiles


def _queries(selected: np.ndarray, data: ReportData) -> Rows:
    """Seeds of each set, and the images that they retrieved."""
    count = max(data.cfg.gallery // max(len(data.origins) - 2, 1), 1)
    for number, name in enumerate(data.origins):
        of_set = selected[selected["origin"] == number]
        queries = np.unique(of_set["query"][of_set["query"] >= 0])
        for query in queries[_even_steps(len(queries), count)]:
            found = of_set[of_set["query"] == query]
            found = found[np.argsort(found["rank"], kind="stable")]
            tiles = [
                _tile(data.sets["pool"], row["image"], f"{row['rank']}: {row['similarity']:.3f}")
                for row in found[: ROW - 1]
            ]
            seed = _tile(data.sets[f"seeds.{name}"], query, f"seed of {name}", "query")
            yield f"retrieved {len(found)}", [seed, *tiles]


def _clusters(selected: np.ndarray, data: ReportData) -> Rows:
    """A sample of each cluster, from the largest to the smallest."""
    sizes = np.bincount(selected["cluster"])
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    rng = np.random.default_rng(0)
    for number in order[_even_steps(len(order), data.cfg.gallery)]:
        images = selected["image"][selected["cluster"] == number]
        sample = np.sort(rng.choice(images, min(ROW, len(images)), replace=False))
        yield f"{sizes[number]:,} images", [_tile(data.sets["pool"], image, "") for image in sample]


def _tile(image_set: ImageSet, number: Any, caption: str, kind: str = "") -> Tile:
    """A picture for the template; without its pixels if it cannot be read."""
    name, src = image_set.name(int(number)), ""
    with suppress(OSError, ValueError):
        src = data_uri(thumbnail(image_set.picture(int(number)), SIDE))
    return Tile(name, caption, src, kind, PurePath(name).name)


def in_words(figures: Mapping[str, Any]) -> str:
    """Figures in one line: 'images 1,000, clusters 31'; a mapping stands in brackets."""
    words = []
    for key, value in figures.items():
        text = f"({in_words(value)})" if isinstance(value, Mapping) else str(value)
        words.append(f"{key.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else text}")
    return ", ".join(words)


def _even_steps(length: int, count: int) -> np.ndarray:
    """At most `count` different indices at even steps over a sequence."""
    return np.unique(np.linspace(0, length - 1, count).astype(int)) if length else np.zeros(0, int)
