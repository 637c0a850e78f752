"""The stage `hash`: copies that need no embedding to be found, and images that cannot be read."""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from enum import IntEnum
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.config import registry
from dinokit.curate.components import Components
from dinokit.curate.hashing import RECORD, near, records
from dinokit.curate.sets import ImageSet
from dinokit.curate.settings import Config
from dinokit.curate.stages import Share, save
from dinokit.runtime.files import write_text

SHARD = 4096  # images whose hashes make a file


class Fate(IntEnum):
    """What becomes of an image of the pool."""

    KEPT = 0
    UNREADABLE = 1  # or its embedding has no direction
    EXACT = 2  # the same pixels as another
    NEAR = 3  # nearly the same, by hash
    DUPLICATE = 4  # of another, by embedding
    OVERLAP = 5  # it, or a copy of it, shows an evaluation image


WHY = {
    Fate.UNREADABLE: "cannot be read, or has no embedding",
    Fate.EXACT: "same pixels as another image",
    Fate.NEAR: "nearly the same as another, by hash",
    Fate.DUPLICATE: "copy of another, by embedding",
    Fate.OVERLAP: "shows an evaluation image, or is a copy of one that does",
}


def what_went(fate: np.ndarray) -> str:
    """How many images of the pool went, and why, in words; fate (n,)."""
    counts = {why: int((fate == kind).sum()) for kind, why in WHY.items()}
    said = "; ".join(f"{count:,}: {why}" for why, count in counts.items() if count)
    return f"of {len(fate):,} images {int((fate != Fate.KEPT).sum()):,} went ({said or 'none'})"


def find_copies(
    cfg: Config, pool: ImageSet, against: list[ImageSet], folder: Path, share: Share
) -> dict[str, Any]:
    """Hash all pictures; in the pool note copies, and what shows an evaluation image.

    Leaves fate.npz: fate (n,), of (n,) the image that a copy is one of, else itself; pixels (n,), 0 if
    unknown; and seen (s, 3): image of the pool, number of the evaluation set, image of it.
    """
    sets = [pool, *against]
    if cfg.hash.bits < 0 or pool.source is None:
        n = len(pool)
        save(folder / "fate.npz", fate=np.zeros(n, np.uint8), of=np.arange(n), pixels=np.zeros(n, np.uint64),
             seen=np.zeros((0, 3), np.int64))  # fmt: skip
        return {"images": n, "computed": 0}
    for one in sets:
        if one.source is not None:
            _hash_all(one, folder / one.label, cfg.hash.processes, share)
    if share.of > 1:
        return {}
    tables = [_table(one, folder / one.label) for one in sets]
    table, n = np.concatenate(tables), len(pool)
    fate, of, seen = judge(table, n, cfg.hash.bits, cfg.dedup.keep == "largest")
    starts = np.cumsum([0, *map(len, tables)])
    which = np.searchsorted(starts, seen[:, 1], side="right") - 1
    seen = np.stack([seen[:, 0], which - 1, seen[:, 1] - starts[which]], axis=1)
    save(folder / "fate.npz", fate=fate, of=of, pixels=table["pixels"][:n], seen=seen)
    counts = {kind.name.lower(): int((fate == kind).sum()) for kind in list(Fate)[1:4]}
    names = f"Unreadable images are named in {folder / pool.label}/*.unreadable.txt."
    return {
        "images": n,
        "computed": sum(len(one) for one in sets if one.source is not None),
        **counts,
        "showing_evaluation_images": len(np.unique(seen[:, 0])),
        **({"note": names} if counts["unreadable"] else {}),
    }


def judge(table: np.ndarray, n: int, bits: int, largest: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What hashes say.

    Args:
        table: RECORDs of the pool's n images, and behind them of evaluation images.
        n: images of the pool.
        bits: that near copies may differ in.
        largest: of a group, keep the one with most pixels rather than the first.

    Returns:
        (n,) Fate; (n,) the image kept in its place; (s, 2) places in `table` of pool image and evaluation
        image that are copies.
    """
    fate = np.where(table["valid"][:n], Fate.KEPT, Fate.UNREADABLE).astype(np.uint8)
    valid = np.flatnonzero(table["valid"])
    _, first, where = np.unique(table["digest"][valid], axis=0, return_index=True, return_inverse=True)
    same = valid[first[where]]  # the first with these pixels
    links = [np.stack([same, valid])]
    # Hashes of copies are equal: the first stands for all. In order, so that of equal hashes an image of the
    # pool does, not an evaluation image: what hangs on that one alone would not be one group.
    only = np.sort(valid[first])
    links += [only[np.stack(pair)] for pair in near(table["hash"][only], bits)]
    of = np.arange(len(table))
    of[valid] = same
    joined, crossed = Components(n), []
    for a, b in links:
        inside = (a < n) & (b < n)
        joined.join(a[inside], b[inside])
        across = (a < n) != (b < n)
        crossed.append(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1)[across])
    exact_of, label = of[:n].copy(), joined.labels()
    keeper = representatives(label, table["pixels"][:n] if largest else None, fate == Fate.KEPT)
    copy = (keeper != np.arange(n)) & (fate == Fate.KEPT)
    twin = (exact_of == exact_of[keeper]) | (exact_of != np.arange(n))
    fate[copy] = np.where(twin, Fate.EXACT, Fate.NEAR)[copy]
    return fate, keeper, np.unique(np.concatenate(crossed), axis=0)


def representatives(label: np.ndarray, pixels: np.ndarray | None, able: np.ndarray) -> np.ndarray:
    """For each point the one that stands for its group: the first, or of those with most pixels the first.

    Args:
        label: (n,) of each point's group, a point of it.
        pixels: (n,); None: the first.
        able: (n,) bool: who may stand for a group; in a group without one, each stands for itself.
    """
    points = np.flatnonzero(able)
    key = np.zeros(len(points)) if pixels is None else -pixels[points].astype(np.float64)
    points = points[np.lexsort((points, key, label[points]))]
    names, first = np.unique(label[points], return_index=True)
    chosen = np.arange(len(label))
    chosen[names] = points[first]
    there = np.zeros(len(label), np.bool_)
    there[names] = True
    return np.where(there[label], chosen[label], np.arange(len(label)))


def _hash_all(one: ImageSet, folder: Path, processes: int, share: Share) -> None:
    """Files of RECORDs, a shard each, and of the sentences for images that cannot be read."""
    todo = [n for n in share.mine(-(-len(one) // SHARD)) if not (folder / f"{n:05d}.npy").exists()]
    assert one.source is not None
    assert one.section is not None
    if processes == 1 or len(todo) < 2:
        for number in todo:
            _write(one.source, number, len(one), folder)
        return
    work = partial(_hash_shard, one.section, len(one), folder)
    with ProcessPoolExecutor(min(processes, len(todo)), get_context("spawn")) as pool:
        list(pool.map(work, todo))


def _hash_shard(section: Mapping[str, Any], n: int, folder: Path, number: int) -> None:
    _write(registry.build("data.sources", section), number, n, folder)


def _write(source: Any, number: int, n: int, folder: Path) -> None:
    found, wrong = records(source, range(number * SHARD, min((number + 1) * SHARD, n)))
    write_text(folder / f"{number:05d}.unreadable.txt", "".join(f"{line}\n" for line in wrong))
    save(folder / f"{number:05d}.npy", only=found)


def _table(one: ImageSet, folder: Path) -> np.ndarray:
    if one.source is None:
        return np.zeros(len(one), RECORD)  # not valid: it takes no part
    return np.concatenate([np.load(folder / f"{n:05d}.npy") for n in range(-(-len(one) // SHARD))])
