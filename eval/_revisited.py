"""Revisited Oxford and Paris (Radenovic et al. 2018, arXiv 1803.11285): truth files and scores."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# For each protocol, what counts as found, and what is as if it were not there.
PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


@dataclass
class Query:
    """A part of an image, and the numbers of the gallery's images that show the same place."""

    name: str
    box: tuple[float, float, float, float] | None  # left, top, right, bottom, in pixels
    truth: dict[str, list[int]]  # easy, hard, junk


def read_truth(path: str) -> tuple[list[str], list[Query]]:
    """The names of the gallery's images, and the queries.

    Args:
        path: gnd_roxford5k.pkl, gnd_rparis6k.pkl, or JSON with the same keys: imlist, qimlist, and gnd with
            bbx, easy, hard, junk. Of a pickle nothing but plain data and arrays is read.

    Raises:
        ValueError: if it is neither, or a number is no image of the gallery.
    """
    file = Path(path).expanduser()
    try:
        data = (
            json.loads(file.read_bytes())
            if file.suffix == ".json"
            else _Plain(BytesIO(file.read_bytes())).load()
        )
        images, names = list(map(str, data["imlist"])), list(map(str, data["qimlist"]))
        queries = [_query(name, about) for name, about in zip(names, data["gnd"], strict=True)]
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"truth={path} is no truth file of Revisited Oxford or Paris: {error!r}.") from None
    for query in queries:
        wrong = [i for row in query.truth.values() for i in row if not 0 <= i < len(images)]
        if wrong:
            raise ValueError(f"truth={path}: query {query.name} names image {wrong[0]} of {len(images)}.")
    return images, queries


def scores_of(ranked: Tensor, queries: Sequence[Query], ks: Sequence[int]) -> dict[str, float]:
    """Mean average precision, and mean precision among the first k, by protocol.

    Args:
        ranked: (Q, N) numbers of the gallery's images, nearest first.
        queries: Q of them.
        ks: numbers of images.
    """
    done: dict[str, float] = {}
    for protocol, (found, junk) in PROTOCOLS.items():
        rows = list(_of_each(ranked, queries, found, junk, ks))
        if rows:  # else no query has a truth of this kind
            means = np.mean(rows, axis=0).tolist()
            names = [f"mAP {protocol}", *(f"mP@{k} {protocol}" for k in ks)]
            done |= dict(zip(names, means, strict=True))
    return done


def _of_each(
    ranked: Tensor, queries: Sequence[Query], found: Sequence[str], junk: Sequence[str], ks: Sequence[int]
) -> Iterator[list[float]]:
    for row, query in zip(ranked.cpu(), queries, strict=True):
        wanted = torch.tensor([i for kind in found for i in query.truth[kind]], dtype=torch.int64)
        if not len(wanted):
            continue
        ignored = torch.tensor([i for kind in junk for i in query.truth[kind]], dtype=torch.int64)
        kept = row[~torch.isin(row, ignored)]
        places = torch.isin(kept, wanted).nonzero().flatten().double()  # from 0
        number = torch.arange(len(places), dtype=torch.float64)
        before = torch.where(places == 0, 1.0, number / places.clamp(min=1))
        after = (number + 1) / (places + 1)
        precision = float(((before + after) / 2).sum() / len(wanted))
        reach = [min(k, int(places.max()) + 1) for k in ks]
        yield [precision, *(float((places < k).sum()) / k for k in reach)]


def _query(name: str, about: Mapping[str, Any]) -> Query:
    box = about.get("bbx")
    corners = None if box is None else tuple(float(x) for x in box)
    if corners is not None and len(corners) != 4:
        raise ValueError(f"bbx of {name} has {len(corners)} numbers")
    kinds = ("easy", "hard", "junk")
    return Query(name, corners, {kind: [int(i) for i in about.get(kind, ())] for kind in kinds})


class _Plain(pickle.Unpickler):
    """Reads data and arrays; anything that could run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return super().find_class(module, name)
