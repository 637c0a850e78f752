"""Image retrieval by cosine of frozen features, without training.

Labelled images: each test image, or each of `query`, retrieves images of its class. With features=copy, a set
`whiten` and `distractors` this is DINO's copy detection (arXiv 2104.14294, section 4.2) on Copydays: copies
are the queries, originals the test images, one class an original.

With truth=gnd_roxford5k.pkl, or that of Paris: the protocol of Revisited Oxford and Paris (arXiv 1803.11285)
on uncropped images whose longer side is `size` pixels; queries are cropped to their boxes.

    Q  queries     N  gallery images     D  width
"""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import Boxes, ResizeLongerSide
from dinokit.eval import ImageConfig
from dinokit.eval._images import (
    count_shared,
    image_features,
    image_sizes,
    images_by_name,
    named_optimistic,
    one_class,
    open_source,
    shared_classes,
)
from dinokit.eval._metrics import revisited_scores
from dinokit.features import Features, Pooling, Subset
from dinokit.models import Backbone

ROWS = 256  # queries ranked at a time
# What a truth file's pickle may contain: arrays and plain data.
PLAIN_DATA = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


@dataclass
class Config(ImageConfig):
    # Images that retrieve test images; none: each test image retrieves the others.
    query: dict[str, Any] | None = source_field("data.sources", "test", optional=True)
    # Further gallery images, which no query looks for.
    distractors: dict[str, Any] | None = source_field("data.sources", "train", optional=True)
    # Images to learn the whitening of features from; none: no whitening.
    whiten: dict[str, Any] | None = source_field("data.sources", "train", optional=True)
    truth: str = ""  # of Revisited Oxford or Paris; test.path then is the folder of its images
    overlap: Literal["refuse", "allow"] = (
        "refuse"  # test images among `query`, `whiten`; allowed: _optimistic
    )
    k: tuple[int, ...] = (1, 5, 10)  # recall@k, or mP@k of a truth file
    features: Literal["cls", "copy"] = "cls"  # copy: class token and the generalised mean of the patches
    scales: tuple[float, ...] = (1.0,)  # of `size`: features are averaged over them; [1, 0.7071, 0.5] in DINO
    # of the eigenvalues that whitening divides by; 0.5 makes all deviations equal
    power: float = only_if(0.5, whiten=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, k=1, scales=1e-3, power=0)
        if not self.k or not self.scales:
            raise ValueError("k and scales must not be empty.")
        if self.truth and (self.query or self.distractors or self.max_test):
            raise ValueError("truth=... names queries and gallery: take out query, distractors and max_test.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Recall and mean average precision of the ranking.

    Returns:
        Of labelled images: 'recall@5', the share of queries with one of their class among the first 5; 'mAP';
        'mAP@R', of the first R where R is the size of the class (arXiv 2003.08505); 'queries', how many have
        a positive, and 'images_test'. Of a truth file: 'mAP medium', 'mP@5 medium' and so on.

    Raises:
        ValueError, LookupError: if the data do not fit; the message names the key to set.
    """
    test = open_source(cfg.test, "test", backbone, cfg.max_test, labelled=not cfg.truth)
    learnt_from = [(key, getattr(cfg, key)) for key in ("query", "whiten") if getattr(cfg, key)]
    shared = sum(
        count_shared(cfg, open_source(section, key, backbone, labelled=False), test, train_key=key)
        for key, section in learnt_from
    )
    white = _fit_whitening(cfg, backbone)
    if cfg.truth:
        return named_optimistic(_evaluate_revisited(cfg, backbone, white, test), shared)
    if len(test.classes) < 2 and not cfg.distractors:
        raise one_class(test.classes[0])  # any ranking would be right
    gallery, queries = _features(cfg, backbone, "test", test), None
    if cfg.query:
        query_source = open_source(cfg.query, "query", backbone)
        shared_classes(test, query_source)
        queries = _features(cfg, backbone, "query", query_source)
    x, y = white(gallery.x), gallery.y
    unreadable = len(gallery.unreadable) + (len(queries.unreadable) if queries else 0)
    if cfg.distractors:
        other_source = open_source(cfg.distractors, "distractors", backbone, labelled=False)
        others = _features(cfg, backbone, "distractors", other_source, labelled=False)
        x, y = torch.cat([x, white(others.x)]), torch.cat([y, torch.full_like(others.y, -1)])
        unreadable += len(others.unreadable)
    if queries is None:
        scores = labelled_scores(x[: len(gallery.y)], gallery.y, x, y, cfg.k, exclude_self=True)
    else:
        scores = labelled_scores(white(queries.x), queries.y, x, y, cfg.k, exclude_self=False)
    scores = named_optimistic({**scores, "images_test": len(gallery.y)}, shared)
    return scores | ({"images_unreadable": unreadable} if unreadable else {})


def _features(
    cfg: Config, backbone: Backbone, key: str, source: ImageSource, labelled: bool = True,
    boxes: Boxes | None = None,
) -> Features:  # fmt: skip
    """Features on the unit sphere, averaged over the scales; of uncropped images if there is a truth file."""
    pooling = Pooling(1, "gem" if cfg.features == "copy" else "none")
    resize, size = image_sizes(cfg, backbone)
    by_scale = []
    for scale in cfg.scales:
        if cfg.truth:
            transform = ResizeLongerSide(round(size * scale), backbone.patch, boxes or {})
            scaled = replace(cfg, size=backbone.patch, resize=backbone.patch, batch=1)  # shapes differ
        else:
            transform, side = None, max(1, round(size * scale / backbone.patch)) * backbone.patch
            scaled = replace(cfg, size=side, resize=max(side, round(resize * scale)))
        by_scale.append(image_features(scaled, key, backbone, source, pooling, transform, labelled=labelled))
    x = torch.stack([features.x for features in by_scale]).sum(dim=0)
    return Features(F.normalize(x, dim=1), by_scale[0].y, by_scale[0].unreadable)


def labelled_scores(
    query: Tensor, classes: Tensor, bank: Tensor, labels: Tensor, ks: Sequence[int], exclude_self: bool
) -> dict[str, float]:
    """recall@k, mAP and mAP@R.

    Args:
        query: (Q, D) on the unit sphere.
        classes: (Q,) of the queries.
        bank: (N, D) on the unit sphere.
        labels: (N,) classes, -1 for distractors.
        ks: numbers of images.
        exclude_self: whether query i is image i of the bank, which does not count.

    Raises:
        ValueError: if no query has a positive.
    """
    sums, queries = torch.zeros(len(ks) + 2, dtype=torch.float64), 0
    for start in range(0, len(query), ROWS):
        cosine = query[start : start + ROWS] @ bank.T
        found = labels == classes[start : start + ROWS, None]
        if exclude_self:
            own = torch.arange(len(cosine), device=cosine.device)
            cosine[own, own + start] = -torch.inf
            found[own, own + start] = False
        found = found.gather(1, cosine.argsort(dim=1, descending=True, stable=True))
        found = found[found.any(dim=1)]
        queries += len(found)
        total = found.sum(dim=1, keepdim=True)
        rank = torch.arange(1, found.shape[1] + 1, device=found.device)
        precision = torch.where(found, found.cumsum(dim=1) / rank, 0.0)
        sums += torch.tensor(
            [
                *(float(found[:, :k].any(dim=1).sum()) for k in ks),
                float((precision.sum(dim=1, keepdim=True) / total).sum()),
                float((torch.where(rank <= total, precision, 0.0).sum(dim=1, keepdim=True) / total).sum()),
            ],
            dtype=torch.float64,
        )
    if not queries:
        raise ValueError(
            "No query has another image of its class to find: give classes of two images or more."
        )
    names = [*(f"recall@{k}" for k in ks), "mAP", "mAP@R"]
    return dict(zip(names, (sums / queries).tolist(), strict=True)) | {"queries": queries}


def whitening(x: Tensor, power: float) -> Callable[[Tensor], Tensor]:
    """A function from features (n, D) to whitened ones on the unit sphere, by the principal axes of x (N, D).

    Axes along which x hardly varies are left out.
    """
    x = x.cpu().double()  # some devices have no float64
    mean = x.mean(dim=0)
    values, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    large = values > 1e-9 * values[-1]
    project = axes[:, large] / values[large] ** power
    return lambda rows: F.normalize((rows.cpu().double() - mean) @ project, dim=1).float().to(rows.device)


def _fit_whitening(cfg: Config, backbone: Backbone) -> Callable[[Tensor], Tensor]:
    if not cfg.whiten:
        return lambda rows: rows
    source = open_source(cfg.whiten, "whiten", backbone, labelled=False)
    return whitening(_features(cfg, backbone, "whiten", source, labelled=False).x, cfg.power)


def _evaluate_revisited(
    cfg: Config, backbone: Backbone, white: Callable[[Tensor], Tensor], source: ImageSource
) -> dict[str, float]:
    images, queries = read_truth(cfg.truth)
    gallery = Subset(source, images_by_name(source, images, cfg.truth))
    cropped = Subset(source, images_by_name(source, [query.name for query in queries], cfg.truth))
    boxes = {i: query.box for i, query in enumerate(queries) if query.box}
    bank = _features(cfg, backbone, "test", gallery, labelled=False)
    query = _features(cfg, backbone, "query", cropped, labelled=False, boxes=boxes)
    unreadable = [*bank.unreadable, *query.unreadable]
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} images of {cfg.truth} cannot be read: {', '.join(unreadable[:5])}."
        )
    ranked = (white(query.x) @ white(bank.x).T).argsort(dim=1, descending=True, stable=True)
    counts = {"queries": len(queries), "images_test": len(images)}
    return revisited_scores(ranked, [query.truth for query in queries], cfg.k) | counts


@dataclass
class Query:
    """A box of an image, and the numbers of the gallery images that show the same place."""

    name: str
    box: tuple[float, float, float, float] | None  # left, top, right, bottom, in pixels
    truth: dict[str, list[int]]  # easy, hard, junk


def read_truth(path: str) -> tuple[list[str], list[Query]]:
    """The names of the gallery images, and the queries.

    Args:
        path: gnd_roxford5k.pkl, gnd_rparis6k.pkl, or JSON with the same keys: imlist, qimlist, and gnd with
            bbx, easy, hard, junk. From a pickle only plain data and arrays are read.

    Raises:
        ValueError: if it is neither, or a number is not an image of the gallery.
    """
    file = Path(path).expanduser()
    try:
        data = (
            json.loads(file.read_bytes())
            if file.suffix == ".json"
            else _PlainUnpickler(BytesIO(file.read_bytes())).load()
        )
        images, names = list(map(str, data["imlist"])), list(map(str, data["qimlist"]))
        queries = [_parse_query(name, entry) for name, entry in zip(names, data["gnd"], strict=True)]
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"truth={path} is not a truth file of Revisited Oxford or Paris: {error!r}."
        ) from None
    for query in queries:
        wrong = [i for row in query.truth.values() for i in row if not 0 <= i < len(images)]
        if wrong:
            raise ValueError(f"truth={path}: query {query.name} names image {wrong[0]} of {len(images)}.")
    return images, queries


def _parse_query(name: str, entry: Mapping[str, Any]) -> Query:
    box = entry.get("bbx")
    corners = None if box is None else tuple(float(x) for x in box)
    if corners is not None and len(corners) != 4:
        raise ValueError(f"bbx of {name} has {len(corners)} numbers")
    kinds = ("easy", "hard", "junk")
    return Query(name, corners, {kind: [int(i) for i in entry.get(kind, ())] for kind in kinds})


class _PlainUnpickler(pickle.Unpickler):
    """Reads data and arrays; refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN_DATA:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data")
        return super().find_class(module, name)
