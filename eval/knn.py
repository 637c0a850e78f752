"""Weighted k-nearest-neighbour classification: how good are features before anything is trained on them.

Each training image among the k nearest by cosine votes for its class with weight exp(cosine / T) (Wu et al.
2018, arXiv 1805.01978, section 3.4; the protocol of DINO, arXiv 2104.14294, and DINOv2, arXiv 2304.07193).
The search is exact. The whole matrix of cosines never exists; it is made block by block.

    Q  queries: test images     N  bank: training images     D  width     C  classes
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if
from dinokit.data.sources import ImageSource
from dinokit.eval import ClassificationConfig
from dinokit.eval._images import count_shared, image_features, named_optimistic, open_source, shared_classes
from dinokit.features import Features
from dinokit.models import Backbone

ROWS, COLUMNS = 1024, 8192  # of a block of cosines: 32 MiB, and about four times that while it is searched


@dataclass
class Config(ClassificationConfig):
    k: tuple[int, ...] = (10, 20, 100, 200)  # neighbours; more than there are images means all of them
    temp: float = 0.07  # a vote weighs softmax(cosine / temp)
    few_shot: tuple[int, ...] = ()  # training images a class, for further scores
    tries: int = only_if(1, few_shot=True)  # draws of these images, averaged

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, k=1, few_shot=1, tries=1)
        if not self.k:
            raise ValueError("k is empty: give at least one number of neighbours, such as k=[20].")
        if self.temp <= 0:
            raise ValueError(f"temp={self.temp}, but it must be above 0.")


def nearest(
    query: Tensor, bank: Tensor, k: int, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """The k rows of bank (N, D) nearest to each row of query (Q, D), both on the unit sphere.

    Returns:
        cosine - 1, (Q, k), largest first, and indices in the bank, (Q, k); of equal cosines the smaller index
        comes first. k is at most N. Memory grows with rows * columns, the size of a block, and with Q * k.
    """
    k = min(k, len(bank))
    blocks = [_nearest_in_block(block, bank, k, columns) for block in query.split(rows)]
    return torch.cat([near for near, _ in blocks]), torch.cat([indices for _, indices in blocks])


def vote(query: Tensor, bank: Tensor, labels: Tensor, k: int, temp: float, classes: int) -> Tensor:
    """The share of the votes of its k nearest neighbours that each class gets, for each query.

    Args:
        query: (Q, D) features, any length.
        bank: (N, D) features with known classes.
        labels: (N,) int64, in [0, classes).
        k: neighbours; N if larger.
        temp: T; a vote weighs softmax(cosine / T) over the k neighbours.
        classes: C.

    Returns:
        (Q, C); rows sum to 1.
    """
    near, indices = nearest(F.normalize(query, dim=1), F.normalize(bank, dim=1), k)
    return _sum_votes((near / temp).softmax(dim=1), labels[indices], classes)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the votes of neighbours.

    Returns:
        'top1@20': the share of test images whose class gets the most votes of 20 neighbours. 'top5@20': the
        share whose class is among the five with most votes, given if there are more than five classes.
        'top1@5 5-shot': with 5 training images a class, the mean over `tries` draws; k then is every one of
        `k` below the number of shots, and that number, as in DINOv2's own evaluation. 'images_train',
        'images_test': how many could be read; 'images_unreadable': how many could not, if there are any.

    Raises:
        ValueError, LookupError: if the data do not fit; the message names the key to set.
    """
    sources = {
        "train": open_source(cfg.train, "train", backbone, cfg.max_train),
        "test": open_source(cfg.test, "test", backbone, cfg.max_test),
    }
    classes = shared_classes(sources["train"], sources["test"])
    shared = count_shared(cfg, sources["train"], sources["test"])
    train, test = (_unit_features(cfg, split, backbone, source) for split, source in sources.items())
    scores = accuracies(train, test, sorted(set(cfg.k)), cfg.temp, len(classes))
    for shots in cfg.few_shot:
        ks = sorted({k for k in cfg.k if k < shots} | {shots})
        banks = [draw_shots(train, shots, seed, classes) for seed in range(cfg.tries)]
        tries = [accuracies(bank, test, ks, cfg.temp, len(classes)) for bank in banks]
        scores |= {f"{key} {shots}-shot": sum(t[key] for t in tries) / cfg.tries for key in tries[0]}
    scores = named_optimistic(scores, shared)
    scores |= {"images_train": len(train.y), "images_test": len(test.y)}
    unreadable = len(train.unreadable) + len(test.unreadable)
    return scores | ({"images_unreadable": unreadable} if unreadable else {})


def _unit_features(cfg: Config, split: str, backbone: Backbone, source: ImageSource) -> Features:
    """Features with every row of x on the unit sphere."""
    features = image_features(cfg, split, backbone, source)
    return Features(F.normalize(features.x, dim=1), features.y, features.unreadable)


def draw_shots(train: Features, shots: int, seed: int, classes: Sequence[str]) -> Features:
    """`shots` training images of each class, drawn by `seed`.

    Raises:
        ValueError: if a class has fewer.
    """
    y, rng = train.y.cpu(), torch.Generator().manual_seed(seed)
    chosen = []
    for label, name in enumerate(classes):
        indices = (y == label).nonzero().flatten()
        if len(indices) < shots:
            raise ValueError(
                f"few_shot={shots} takes {shots} training images a class, but '{name}' has {len(indices)}. "
                f"Take fewer, or raise max_train if it is set."
            )
        chosen.append(indices[torch.randperm(len(indices), generator=rng)[:shots]])
    indices = torch.cat(chosen).sort().values.to(train.x.device)
    return Features(train.x[indices], train.y[indices], [])


def accuracies(train: Features, test: Features, ks: list[int], temp: float, classes: int) -> dict[str, float]:
    """Top-1, and with more than five classes top-5, for each number of neighbours."""
    tops = (1, 5) if classes > 5 else (1,)
    right = torch.zeros(len(ks), len(tops), dtype=torch.int64, device=test.x.device)
    for x, y in zip(test.x.split(ROWS), test.y.split(ROWS), strict=True):
        near, indices = nearest(x, train.x, max(ks))
        weights, labels = (near / temp).softmax(dim=1), train.y[indices]  # shared by all k, as in DINOv2
        for i, k in enumerate(ks):
            rank = _rank(_sum_votes(weights[:, :k], labels[:, :k], classes), y)
            right[i] += torch.stack([(rank < top).sum() for top in tops])
    shares = (right.cpu().double() / len(test.y)).tolist()
    return {f"top{top}@{k}": shares[i][j] for j, top in enumerate(tops) for i, k in enumerate(ks)}


def _sum_votes(weights: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Weights (Q, k) summed by the labels (Q, k) that they are given to: (Q, classes)."""
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def _rank(votes: Tensor, labels: Tensor) -> Tensor:
    """Classes before the true one, (Q,); with equal votes the smaller; all if it has no vote."""
    own = votes.gather(1, labels[:, None])
    before = torch.arange(votes.shape[1], device=votes.device) < labels[:, None]
    rank = ((votes > own) | ((votes == own) & before)).sum(dim=1)
    return torch.where(own[:, 0] > 0, rank, votes.shape[1])


def _nearest_in_block(query: Tensor, bank: Tensor, k: int, columns: int) -> tuple[Tensor, Tensor]:
    # Features of an untrained or collapsed backbone are so similar that all their cosines round to 1. After
    # subtracting the mean, distances do not: on the unit sphere, cosine - 1 is minus half their square.
    mean = bank.mean(dim=0)
    query = query - mean
    near = query.new_empty(len(query), 0)
    indices = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), columns):
        block = bank[start : start + columns] - mean
        cosines = query @ block.T - block.square().sum(1) / 2 - query.square().sum(1, keepdim=True) / 2
        numbers = torch.arange(start, start + len(block), device=query.device).expand(len(query), -1)
        near, chosen = _largest(torch.cat([near, cosines], dim=1), k)
        indices = torch.cat([indices, numbers], dim=1).gather(1, chosen)
    return near, indices


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in order, and their columns; unlike topk, the first of equal values."""
    if x.shape[1] > k:
        least = x.topk(k, dim=1).values[:, -1:]
        above, level = x > least, x == least
        chosen = above | (
            level & (level.cumsum(dim=1, dtype=torch.int32) <= k - above.sum(dim=1, keepdim=True))
        )
        columns = chosen.nonzero()[:, 1].view(len(x), k)
    else:
        columns = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    values, order = x.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
