"""Writes the results of a curation: manifest.csv, which data.name=manifest reads, and report.html."""

import csv
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from dinokit.curate.clustering import entropy
from dinokit.curate.dedup import REASONS, Status, groups, load_status
from dinokit.curate.image_sets import ImageSet, key_of, thumbnail
from dinokit.curate.retrieve import ALL, BALANCE, origins
from dinokit.curate.settings import Config, Seeds
from dinokit.runtime.files import atomic, write_text

HEADER = ("path", "from", "rule", "query", "rank", "similarity", "cluster")
SIDE = 112  # pixels of a picture
ROW = 8  # pictures in a row
BARS = 200  # bars of a diagram at most
_STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222}
h1 {font-size: 1.5em} h2 {font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc}
table {border-collapse: collapse} td, th {padding: .2em .9em .2em 0; text-align: left; vertical-align: top}
.n {text-align: right; font-variant-numeric: tabular-nums}
.row {display: flex; flex-wrap: wrap; gap: 6px; align-items: flex-start; margin: 8px 0}
.row > b {width: 110px; flex: none; font-weight: normal; color: #666}
.row figure {margin: 0; width: 112px; font-size: 11px; color: #666}
.row span {display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.row img, .none {width: 112px; height: 112px; object-fit: contain; background: #eee; display: block}
.row .none {height: 8px}
.row .query img {outline: 2px solid #4a7ab5; outline-offset: -2px} .row .query span {color: #4a7ab5}
svg {width: 100%; height: 90px; background: #f6f6f6}
"""
Tile = tuple[ImageSet, int, str]  # a set, an image of it, the caption


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
                row = [f"seeds.{name}", rule, seeds[name].name(query), rank, f"{similarity:.4f}", cluster]
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
    status = overlap["status"]
    cluster = np.load(data.folders["clusters"] / "clusters.npz")["cluster"]
    selected = np.load(data.folders["retrieve"] / "selection.npy")
    sections = {
        "What was removed and selected": _funnel(status, selected, data),
        "Stages": _stages(data.figures),
        "Clusters before and after": _cluster_sizes(status, cluster, selected),
        "Groups of duplicates": _groups(status, label, data),
        "Images that show evaluation images": _overlaps(overlap["shown"], data),
        "Images retrieved by seeds": "".join(_queries(selected, data)) or "<p>There are no seeds.</p>",
        "Clusters of the training set": _clusters(selected, data),
    }
    title = escape(f"Curation {data.cfg.out}")
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    body = "".join(f"<h2>{escape(name)}</h2>{content}" for name, content in sections.items())
    write_text(
        path,
        f"<!doctype html><html lang='en'>{head}<title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>{body}</html>\n",
    )
    return {"bytes": path.stat().st_size}


def _funnel(status: np.ndarray, selected: np.ndarray, data: ReportData) -> str:
    n = len(status)
    rows: list[tuple[str, int, int | str]] = [("images in the pool", n, n)]
    left = n
    for kind, reason in REASONS.items():
        removed = int((status == kind).sum())
        left -= removed
        rows.append((reason, -removed, left))
    removed = left - len(selected)
    rows.append(("not retrieved by seeds, nor drawn by balance", -removed, len(selected)))
    counts = np.bincount(selected["origin"], minlength=len(data.origins))
    how = {BALANCE: "drawn evenly over hierarchical clusters", ALL: "all that were left"}
    for name, count in zip(data.origins, counts.tolist(), strict=True):
        if count:
            rows.append((f"of these {how.get(name, f'retrieved by seeds.{name}')}", count, ""))
    return _table(("what", "images", "left"), rows)


def _stages(figures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, values in figures.items():
        others = {key: value for key, value in values.items() if key != "seconds"}
        rows.append((name, values.get("seconds", ""), in_words(others)))
    return _table(("stage", "seconds", "figures"), rows)


def _cluster_sizes(status: np.ndarray, cluster: np.ndarray, selected: np.ndarray) -> str:
    """Sizes of clusters, largest first: of the embedded images, the clean pool and the training set."""
    count = int(cluster.max()) + 1
    clean = cluster[(status == Status.CLEAN) & (cluster >= 0)]
    counts = {
        "embedded": np.bincount(cluster[cluster >= 0], minlength=count),
        "without duplicates and evaluation images": np.bincount(clean, minlength=count),
        "training set": np.bincount(selected["cluster"], minlength=count),
    }
    diagrams = "".join(
        f"<p>{name}: {int(sizes.sum()):,} images, entropy {entropy(sizes):.3f} of 1</p>{_bars(sizes)}"
        for name, sizes in counts.items()
    )
    return f"{diagrams}<p>One bar a cluster, by size. Entropy is 1 if all clusters are of the same size.</p>"


def _groups(status: np.ndarray, label: np.ndarray, data: ReportData) -> str:
    """The largest groups, then as many at even steps down to the smallest."""
    members, starts = groups(label)
    if len(starts) < 2:
        return "<p>There are none.</p>"
    order = np.argsort(-np.diff(starts), kind="stable")
    first = min(data.cfg.gallery // 2, len(order) - 1)
    steps = np.linspace(first, len(order) - 1, data.cfg.gallery - data.cfg.gallery // 2).astype(int)
    pool, rows = data.sets["pool"], []
    for number in order[np.unique([*range(first), *steps])]:
        images = members[starts[number] : starts[number + 1]]
        images = images[np.lexsort((images, status[images]))]
        tiles = [(pool, int(image), Status(status[image]).name.lower()) for image in images[:ROW]]
        rows.append(_row(f"{len(images)} images", tiles))
    about = f"{len(order):,} groups; the {first} largest, then others at even steps down to the smallest."
    return f"<p>{about}</p>" + "".join(rows)


def _overlaps(shown: np.ndarray, data: ReportData) -> str:
    if not len(shown):
        return "<p>There are none, or no evaluation set was given (against.NAME.path=...).</p>"
    against = [label for label in data.sets if label.startswith("against.")]
    order = np.argsort(shown[:, 3], kind="stable")  # the least similar first: mistakes are most likely there
    rows = []
    for place in order[_even_steps(len(order), data.cfg.gallery)]:
        image, number, other, similarity = shown[place]
        label = against[int(number)]
        tiles = [(data.sets["pool"], int(image), "pool"), (data.sets[label], int(other), label)]
        rows.append(_row(f"similarity {similarity:.3f}", tiles))
    return f"<p>{len(shown):,} matches, from the least similar to the most.</p>" + "".join(rows)


def _queries(selected: np.ndarray, data: ReportData) -> Iterator[str]:
    pool = data.sets["pool"]
    for number, name in enumerate(data.origins):
        of_set = selected[selected["origin"] == number]
        queries = np.unique(of_set["query"][of_set["query"] >= 0])
        if not len(queries):
            continue
        seeds = data.sets[f"seeds.{name}"]
        count = max(data.cfg.gallery // max(len(data.origins) - 2, 1), 1)
        for query in queries[_even_steps(len(queries), count)]:
            found = of_set[of_set["query"] == query]
            found = found[np.argsort(found["rank"], kind="stable")]
            tiles = [(seeds, int(query), f"seed of {name}")]
            tiles += [
                (pool, int(r["image"]), f"{r['rank']}: {r['similarity']:.3f}") for r in found[: ROW - 1]
            ]
            yield _row(f"retrieved {len(found)}", tiles, first_is_query=True)


def _clusters(selected: np.ndarray, data: ReportData) -> str:
    sizes = np.bincount(selected["cluster"])
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    rows, rng = [], np.random.default_rng(0)
    for number in order[_even_steps(len(order), data.cfg.gallery)]:
        images = selected["image"][selected["cluster"] == number]
        sample = np.sort(rng.choice(images, min(ROW, len(images)), replace=False))
        tiles = [(data.sets["pool"], int(image), "") for image in sample]
        rows.append(_row(f"{sizes[number]:,} images", tiles))
    return f"<p>{len(order):,} clusters have images; from the largest to the smallest.</p>" + "".join(rows)


def in_words(figures: Mapping[str, Any]) -> str:
    """Figures in one line: 'images 1,000, clusters 31'; a mapping stands in brackets."""
    words = []
    for key, value in figures.items():
        text = f"({in_words(value)})" if isinstance(value, Mapping) else str(value)
        words.append(f"{key.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else text}")
    return ", ".join(words)


def _even_steps(length: int, count: int) -> np.ndarray:
    """At most `count` different indices at even steps over a sequence."""
    return np.unique(np.linspace(0, length - 1, count).astype(int))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers stand to the right, with thousands separated."""
    numeric = [any(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    names = "".join(
        f"<th{' class=n' * right}>{escape(name)}" for name, right in zip(head, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}" for row in rows)
    return f"<table><tr>{names}{body}</table>"


def _cell(value: Any) -> str:
    return f"<td class=n>{value:,}" if isinstance(value, int | float) else f"<td>{escape(str(value))}"


def _bars(sizes: np.ndarray) -> str:
    """A diagram of sizes, largest first; with many sizes, each bar is the mean of several."""
    ordered = np.sort(sizes)[::-1].astype(np.float64)
    means = np.array([some.mean() for some in np.array_split(ordered, min(BARS, len(ordered)))])
    high = max(float(means.max(initial=0)), 1e-9)
    step = 1000 / len(means)
    bars = "".join(
        f"<rect x='{i * step:.2f}' y='{90 - 88 * v / high:.2f}' width='{step * 0.9:.2f}' "
        f"height='{88 * v / high:.2f}' fill='#4a7ab5'/>"
        for i, v in enumerate(means)
    )
    return f"<svg viewBox='0 0 1000 90' preserveAspectRatio='none'>{bars}</svg>"


def _row(title: str, tiles: Sequence[Tile], first_is_query: bool = False) -> str:
    """Pictures side by side; the first is framed if it is the query."""
    figures = "".join(_figure(*tile, first_is_query and not place) for place, tile in enumerate(tiles))
    return f"<div class=row><b>{escape(title)}</b>{figures}</div>"


def _figure(image_set: ImageSet, number: int, caption: str, is_query: bool) -> str:
    """A picture with its caption and name; without the picture if it cannot be read."""
    name = image_set.name(number)
    try:
        with BytesIO() as file:
            thumbnail(image_set.picture(number), SIDE).save(file, "JPEG", quality=75)
            picture = f"<img alt='' src='data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}'>"
    except (OSError, ValueError):
        picture = "<div class=none></div>"
    lines = "".join(f"<span>{escape(text)}</span>" for text in (caption, PurePath(name).name))
    return f"<figure{' class=query' * is_query} title='{escape(name, quote=True)}'>{picture}{lines}</figure>"
