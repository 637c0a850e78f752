"""Finding images by their features: the nearest by cosine come first, and nothing is trained.

Labelled images: each test image, or each of `query`, looks for those of its class. With features=copy, a set
`whiten` and `distractors` that is DINO's copy detection (arXiv 2104.14294, section 4.2), on Copydays: copies
are the queries, originals the test images, one class an original.

With truth=gnd_roxford5k.pkl, or that of Paris: the protocol of Revisited Oxford and Paris, on whole images
whose longer side is `size` pixels; queries are cut out by their boxes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import Boxes, ResizeLongerSide
from dinokit.eval import _labelled, _revisited
from dinokit.eval._truth import places_by_name
from dinokit.features import Features, Pooling, Subset
from dinokit.models import Backbone

ROWS = 256  # queries ranked at a time


@dataclass
class Config:
    test: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources", "split": "test"})
    # Images that look for test images; none: each test image looks for the others.
    query: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "test", "optional": True}
    )
    # Images beside the test images that nobody looks for.
    distractors: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "train", "optional": True}
    )
    # Images that features are whitened by; none: they are not.
    whiten: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "train", "optional": True}
    )
    truth: str = ""  # of Revisited Oxford or Paris; test.path then is the folder of its images
    k: tuple[int, ...] = (1, 5, 10)  # recall@k, or mP@k of a ground-truth file
    features: Literal["cls", "copy"] = "cls"  # copy: beside it, the generalised mean of the patches
    scales: tuple[float, ...] = (1.0,)  # of `size`: features are averaged over them; [1, 0.7071, 0.5] in DINO
    # of the eigenvalues that whitening divides by; 0.5 makes all deviations equal
    power: float = only_if(0.5, whiten=True)
    size: int = 0  # pixels; 0: what the backbone was trained on
    resize: int = 0  # pixels of the shorter side before the centre is cut out; 0: 256 / 224 of `size`
    batch: int = 256  # images, for the backbone
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_unreadable: float = 0.01  # share of a set's images that may be unreadable: they are left out
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    cache: str | None = None  # folder where features are kept for the next evaluator; none: they are not

    def __post_init__(self) -> None:
        check_at_least(self, k=1, scales=1e-3, power=0, size=0, resize=0, batch=1, max_test=0)
        if not self.k or not self.scales:
            raise ValueError("k and scales must not be empty.")
        if self.truth and (self.query or self.distractors or self.max_test):
            raise ValueError("truth=... names queries and gallery: take out query, distractors and max_test.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """How early what is looked for is found.

    Returns:
        Of labelled images: 'recall@5', the share of queries with one of their class among the first 5; 'mAP';
        'mAP@R', of the first R where R is the size of the class (arXiv 2003.08505); 'queries', how many have
        something to find, and 'images_test'. Of a truth file: 'mAP medium', 'mP@5 medium' and so on.

    Raises:
        ValueError, LookupError: if the data cannot be judged; the message names the key to set.
    """
    look = partial(_look, cfg, backbone)
    white = _whitening(cfg, backbone)
    if cfg.truth:
        return _revisit(cfg, backbone, white)
    test = _labelled.open_source(cfg.test, "test", backbone, cfg.max_test)
    if len(test.classes) < 2 and not cfg.distractors:
        raise _labelled.one_class(test.classes[0])  # whatever is found would be right
    gallery, queries = look("test", test), None
    if cfg.query:
        asked = _labelled.open_source(cfg.query, "query", backbone)
        _labelled.shared_classes(test, asked)
        queries = look("query", asked)
    x, y = white(gallery.x), gallery.y
    lost = len(gallery.unreadable) + (len(queries.unreadable) if queries else 0)
    if cfg.distractors:
        others = _labelled.open_source(cfg.distractors, "distractors", backbone, labelled=False)
        more = look("distractors", others, labelled=False)
        x, y = torch.cat([x, white(more.x)]), torch.cat([y, torch.full_like(more.y, -1)])
        lost += len(more.unreadable)
    if queries is None:
        scores = labelled_scores(x[: len(gallery.y)], gallery.y, x, y, cfg.k, itself=True)
    else:
        scores = labelled_scores(white(queries.x), queries.y, x, y, cfg.k, itself=False)
    scores["images_test"] = len(gallery.y)
    return scores | ({"images_unreadable": lost} if lost else {})


def labelled_scores(
    query: Tensor, wanted: Tensor, bank: Tensor, labels: Tensor, ks: Sequence[int], itself: bool
) -> dict[str, float]:
    """recall@k, mAP and mAP@R.

    Args:
        query: (Q, D) on the unit sphere.
        wanted: (Q,) classes.
        bank: (N, D) on the unit sphere.
        labels: (N,) classes, -1 for what nobody looks for.
        ks: numbers of images.
        itself: whether query i is image i of the bank, which it may not find.

    Raises:
        ValueError: if no query has anything to find.
    """
    sums, queries = torch.zeros(len(ks) + 2, dtype=torch.float64), 0
    for start in range(0, len(query), ROWS):
        cosine = query[start : start + ROWS] @ bank.T
        found = labels == wanted[start : start + ROWS, None]
        if itself:
            own = torch.arange(len(cosine), device=cosine.device)
            cosine[own, own + start] = -torch.inf
            found[own, own + start] = False
        found = found.gather(1, cosine.argsort(dim=1, descending=True, stable=True))
        found = found[found.any(dim=1)]
        queries += len(found)
        total = found.sum(dim=1, keepdim=True)
        place = torch.arange(1, found.shape[1] + 1, device=found.device)
        precision = torch.where(found, found.cumsum(dim=1) / place, 0.0)
        sums += torch.tensor(
            [
                *(float(found[:, :k].any(dim=1).sum()) for k in ks),
                float((precision.sum(dim=1, keepdim=True) / total).sum()),
                float((torch.where(place <= total, precision, 0.0).sum(dim=1, keepdim=True) / total).sum()),
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
    """From features (n, D) to whitened ones on the unit sphere, by the principal axes of x (N, D).

    Axes along which x hardly varies are left out.
    """
    x = x.cpu().double()  # some devices have no float64
    middle = x.mean(dim=0)
    values, axes = torch.linalg.eigh((x - middle).T @ (x - middle) / len(x))
    kept = values > 1e-9 * values[-1]
    project = axes[:, kept] / values[kept] ** power
    return lambda rows: F.normalize((rows.cpu().double() - middle) @ project, dim=1).float().to(rows.device)


def _whitening(cfg: Config, backbone: Backbone) -> Callable[[Tensor], Tensor]:
    if not cfg.whiten:
        return lambda rows: rows
    source = _labelled.open_source(cfg.whiten, "whiten", backbone, labelled=False)
    return whitening(_look(cfg, backbone, "whiten", source, labelled=False).x, cfg.power)


def _look(
    cfg: Config,
    backbone: Backbone,
    key: str,
    source: ImageSource,
    labelled: bool = True,
    boxes: Boxes | None = None,
) -> Features:
    """Features on the unit sphere, averaged over the scales; of whole images if there is a truth file."""
    reading = Pooling(1, "gem" if cfg.features == "copy" else "none")
    resize, size = _labelled.sizes(cfg, backbone)
    seen = []
    for scale in cfg.scales:
        if cfg.truth:
            cut = ResizeLongerSide(round(size * scale), backbone.patch, boxes or {})
            one = replace(cfg, size=backbone.patch, resize=backbone.patch, batch=1)  # shapes differ
        else:
            cut, side = None, max(1, round(size * scale / backbone.patch)) * backbone.patch
            one = replace(cfg, size=side, resize=max(side, round(resize * scale)))
        seen.append(_labelled.features_of(one, key, backbone, source, reading, cut, labelled=labelled))
    x = torch.stack([features.x for features in seen]).sum(dim=0)
    return Features(F.normalize(x, dim=1), seen[0].y, seen[0].unreadable)


def _revisit(cfg: Config, backbone: Backbone, white: Callable[[Tensor], Tensor]) -> dict[str, float]:
    images, queries = _revisited.read_truth(cfg.truth)
    source = _labelled.open_source(cfg.test, "test", backbone, labelled=False)
    gallery = Subset(source, places_by_name(source, images, cfg.truth))
    asked = Subset(source, places_by_name(source, [query.name for query in queries], cfg.truth))
    boxes = {i: query.box for i, query in enumerate(queries) if query.box}
    bank = _look(cfg, backbone, "test", gallery, labelled=False)
    query = _look(cfg, backbone, "query", asked, labelled=False, boxes=boxes)
    lost = [*bank.unreadable, *query.unreadable]
    if lost:
        raise ValueError(f"{len(lost)} images of {cfg.truth} cannot be read: {', '.join(lost[:5])}.")
    ranked = (white(query.x) @ white(bank.x).T).argsort(dim=1, descending=True, stable=True)
    counts = {"queries": len(queries), "images_test": len(images)}
    return _revisited.scores_of(ranked, queries, cfg.k) | counts
