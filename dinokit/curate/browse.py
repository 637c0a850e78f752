"""Files to look through a pool after a curation: clusters.csv, and a contact sheet of each cluster."""

import csv
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.dedup import Status
from dinokit.curate.image_sets import Embeddings, ImageSet, contact_sheet
from dinokit.curate.index import CHUNK, exact_search
from dinokit.runtime.files import atomic, file_cell

NEIGHBOURS = 5  # of each image in clusters.csv
SHEETS, ON_SHEET = 100, 36  # the largest clusters that get a sheet, and images on it
PICTURE = 112  # pixels


def write_clusters(
    out: Path,
    pool: ImageSet,
    embedded: Embeddings,
    status: np.ndarray,
    cluster: np.ndarray,
    selected: np.ndarray,
    search: bool,
) -> dict[str, Any]:
    """Write OUT/clusters.csv, a line an image, and OUT/clusters/NUMBER.jpg.

    Args:
        out: the folder of the curation.
        pool: the images.
        embedded: those with embeddings.
        status: (n,) by image, a Status.
        cluster: (n,) by image; -1: none.
        selected: numbers of the images that are in the training set.
        search: whether to write the nearest images too, which compares every pair.
    """
    chosen = np.isin(np.arange(len(status)), selected)
    numbers = range(1, NEIGHBOURS + 1) if search else ()
    header = ["path", "cluster", "status", "selected"]
    header += [f"{what}_{number}" for number in numbers for what in ("neighbour", "similarity")]
    with (
        atomic(out / "clusters.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        for start, queries in embedded.vectors.chunks(CHUNK):
            images = embedded.images[start : start + len(queries)]
            near = _neighbours(pool, embedded, queries, images) if search else [[] for _ in images]
            for image, beside in zip(images.tolist(), near, strict=True):
                why = Status(status[image]).name.lower()
                table.writerow(
                    [file_cell(pool.name(image)), cluster[image], why, int(chosen[image]), *beside]
                )
    return {"sheets": _sheets(out / "clusters", pool, cluster) if pool.source is not None else 0}


def _neighbours(
    pool: ImageSet, embedded: Embeddings, queries: np.ndarray, images: np.ndarray
) -> list[list[str]]:
    """For each query: the name and similarity of its nearest images, without itself."""
    similarity, rows = exact_search(queries, embedded.vectors, NEIGHBOURS + 1, gpu=False)
    result = []
    for image, values, numbers in zip(images, similarity, rows, strict=True):
        found = [(embedded.images[n], v) for n, v in zip(numbers, values, strict=True) if n >= 0]
        others = [(number, value) for number, value in found if number != image][:NEIGHBOURS]
        result.append(
            [text for number, value in others for text in (file_cell(pool.name(int(number))), f"{value:.4f}")]
        )
    return result


def _sheets(folder: Path, pool: ImageSet, cluster: np.ndarray) -> int:
    """Write a sheet of each cluster, of images at even steps through it. Returns their number."""
    shutil.rmtree(folder, ignore_errors=True)
    sizes = np.bincount(cluster[cluster >= 0])
    order = np.argsort(-sizes, kind="stable")[: min(SHEETS, int(np.count_nonzero(sizes)))]
    folder.mkdir(parents=True)
    for number in order.tolist():
        images = np.flatnonzero(cluster == number)
        tiles: list[Any] = []
        for image in images[np.unique(np.linspace(0, len(images) - 1, ON_SHEET).astype(int))].tolist():
            picture = None
            with suppress(OSError, ValueError):  # its name stands on the sheet without it
                picture = pool.picture(image)
            tiles.append((picture, Path(pool.name(image)).name))
        with atomic(folder / f"{number:03d}.jpg") as temporary, temporary.open("wb") as file:
            contact_sheet(tiles, PICTURE).save(file, "JPEG", quality=85)
    return len(order)
