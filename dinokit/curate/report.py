"""report.html: what came and went at every stage and why, with pictures; one file that needs no other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.balance import entropy
from dinokit.curate.choose import ALL, BALANCE
from dinokit.curate.components import groups
from dinokit.curate.copies import WHY, Fate
from dinokit.curate.page import bars, figure, page, row, section, table
from dinokit.curate.sets import ImageSet
from dinokit.curate.settings import Config
from dinokit.curate.stages import in_words
from dinokit.runtime.files import write_text

WIDE = 8  # pictures of a row


@dataclass
class Shown:
    """What there is to show."""

    cfg: Config
    sets: Mapping[str, ImageSet]
    origins: list[str]
    figures: Mapping[str, Mapping[str, Any]]  # by stage
    folders: Mapping[str, Path]  # by stage


def write_report(path: Path, shown: Shown) -> dict[str, Any]:
    """Write it."""
    with np.load(shown.folders["dedup"] / "groups.npz") as said:
        label = said["label"]
    with np.load(shown.folders["overlap"] / "fate.npz") as said:
        fate, seen = said["fate"], said["shown"]
    cluster = np.load(shown.folders["clusters"] / "clusters.npz")["cluster"]
    picks = np.load(shown.folders["retrieve"] / "picks.npy")
    parts = [
        section("What came and went", _funnel(fate, picks, shown)),
        section("Stages", _stages(shown.figures)),
        section("Clusters before and after", _spread(fate, cluster, picks)),
        section("Groups of copies", _groups(fate, label, shown)),
        section("Images that show evaluation images", _overlaps(seen, shown)),
        section("What seeds brought", _queries(picks, shown)),
        section("Clusters of the training set", _clusters(picks, shown)),
    ]
    write_text(path, page(f"Curation {shown.cfg.out}", parts))
    return {"bytes": path.stat().st_size}


def _funnel(fate: np.ndarray, picks: np.ndarray, shown: Shown) -> str:
    n = len(fate)
    rows: list[tuple[str, int, int | str]] = [("images in the pool", n, n)]
    left = n
    for kind, why in WHY.items():
        gone = int((fate == kind).sum())
        left -= gone
        rows.append((why, -gone, left))
    gone = left - len(picks)
    asked = "asked for by no seed and drawn by no balance" if gone else "not taken"
    rows.append((asked, -gone, len(picks)))
    brought = np.bincount(picks["origin"], minlength=len(shown.origins))
    for name, count in zip(shown.origins, brought.tolist(), strict=True):
        if count:
            how = {BALANCE: "drawn evenly over clusters of clusters", ALL: "all that was left"}
            rows.append((f"of these {how.get(name, f'brought by seeds.{name}')}", count, ""))
    return table(("what", "images", "left"), rows)


def _stages(figures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, found in figures.items():
        told = {key: value for key, value in found.items() if key != "seconds"}
        rows.append((name, found.get("seconds", ""), in_words(told)))
    return table(("stage", "seconds", "figures"), rows)


def _spread(fate: np.ndarray, cluster: np.ndarray, picks: np.ndarray) -> str:
    """Shares of clusters, largest first: of all that was embedded, of what is left, of what was taken."""
    count = int(cluster.max()) + 1
    counts = {
        "embedded": np.bincount(cluster[cluster >= 0], minlength=count),
        "without copies and evaluation images": np.bincount(
            cluster[(fate == Fate.KEPT) & (cluster >= 0)], minlength=count
        ),
        "training set": np.bincount(picks["cluster"], minlength=count),
    }
    return (
        "".join(
            figure(bars(sizes), f"{name}: {int(sizes.sum()):,} images, entropy {entropy(sizes):.3f} of 1")
            for name, sizes in counts.items()
        )
        + "<p>One bar a cluster, by size. Entropy is 1 if all clusters are of the same size.</p>"
    )


def _groups(fate: np.ndarray, label: np.ndarray, shown: Shown) -> str:
    """The largest groups, and as many at even steps down to the smallest."""
    members, ends = groups(label)
    if len(ends) < 2:
        return "<p>There are none.</p>"
    order = np.argsort(-np.diff(ends), kind="stable")
    first = min(shown.cfg.gallery // 2, len(order) - 1)
    steps = np.linspace(first, len(order) - 1, shown.cfg.gallery - shown.cfg.gallery // 2).astype(int)
    chosen = order[np.unique([*range(first), *steps])]
    pool, done = shown.sets["pool"], []
    for number in chosen:
        own = members[ends[number] : ends[number + 1]]
        own = own[np.lexsort((own, fate[own]))]
        tiles = [(pool, int(image), Fate(fate[image]).name.lower()) for image in own[:WIDE]]
        done.append(row(f"{len(own)} images", tiles))
    said = f"{len(order):,} groups; the {first} largest, then others at even steps down to the smallest."
    return f"<p>{said}</p>" + "".join(done)


def _overlaps(seen: np.ndarray, shown: Shown) -> str:
    if not len(seen):
        return "<p>There are none, or no evaluation set was given (against.NAME.path=...).</p>"
    against = [label for label in shown.sets if label.startswith("against.")]
    order = np.argsort(seen[:, 3], kind="stable")  # the least alike first: where mistakes would be
    done = []
    for place in order[np.unique(np.linspace(0, len(order) - 1, shown.cfg.gallery).astype(int))]:
        image, number, other, similarity = seen[place]
        label = against[int(number)]
        tiles = [
            (shown.sets["pool"], int(image), "pool"),
            (shown.sets[label], int(other), label),
        ]
        done.append(row(f"similarity {similarity:.3f}", tiles))
    return f"<p>{len(seen):,} matches; from the least alike to the most.</p>" + "".join(done)


def _queries(picks: np.ndarray, shown: Shown) -> str:
    return "".join(_of_seeds(picks, shown)) or "<p>There are no seeds.</p>"


def _of_seeds(picks: np.ndarray, shown: Shown) -> Iterator[str]:
    pool = shown.sets["pool"]
    for number, name in enumerate(shown.origins):
        own = picks[picks["origin"] == number]
        queries = np.unique(own["query"][own["query"] >= 0])
        if not len(queries):
            continue
        seeds = shown.sets[f"seeds.{name}"]
        each = max(shown.cfg.gallery // max(len(shown.origins) - 2, 1), 1)
        for query in queries[np.unique(np.linspace(0, len(queries) - 1, each).astype(int))]:
            found = own[own["query"] == query]
            found = found[np.argsort(found["rank"], kind="stable")]
            tiles = [(seeds, int(query), f"seed of {name}")]
            tiles += [
                (pool, int(pick["image"]), f"{pick['rank']}: {pick['similarity']:.3f}")
                for pick in found[: WIDE - 1]
            ]
            yield row(f"brought {len(found)}", tiles, asks=True)


def _clusters(picks: np.ndarray, shown: Shown) -> str:
    sizes = np.bincount(picks["cluster"])
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    done, rng = [], np.random.default_rng(0)
    for number in order[np.unique(np.linspace(0, len(order) - 1, shown.cfg.gallery).astype(int))]:
        own = picks["image"][picks["cluster"] == number]
        some = np.sort(rng.choice(own, min(WIDE, len(own)), replace=False))
        done.append(row(f"{sizes[number]:,} images", [(shown.sets["pool"], int(i), "") for i in some]))
    return f"<p>{len(order):,} clusters hold images; from the largest to the smallest.</p>" + "".join(done)
