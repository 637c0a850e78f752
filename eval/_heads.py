"""Many linear classifiers trained at once on the same features, in few and large matrix products.

Every row of features holds the class tokens of the last blocks, in the order of depth, and then the mean of
the last block's patches (features/reading.py). So the input of a head on the last n blocks, with or without
that mean, is a run of neighbouring columns, of which no copy is made. The weights of all heads are one
matrix, in such an order that the heads that see a block, or the mean, are neighbours: one product for each
block serves them all. Heads share nothing else: each learns what it would learn alone.

    b  rows of a step     W  columns of a row     w  columns of an input
    I  inputs             R  rates on each        C  classes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.sampler import hash_key
from dinokit.runtime.distributed import all_reduce_sum, world_size


@dataclass(frozen=True)
class Head:
    """One classifier of the grid."""

    blocks: int  # it sees the class tokens of so many last blocks
    pool: bool  # and the mean of the last block's patches
    lr: float  # for a batch of 256


class Heads:
    """A grid of heads: each input with each rate.

    Args:
        grid: the heads.
        width: of the backbone.
        most: class tokens in a row of features.
        classes: C.
        many: whether an image may have many classes: then each is a binary question of its own.
        batch: images a step, by which a head's rate is scaled.
        seed: of the first weights; a head's do not depend on which others there are.
        device: where to train.

    Raises:
        ValueError: if an input has not the rates of the others.
    """

    def __init__(
        self, grid: Sequence[Head], width: int, most: int, classes: int, many: bool, batch: int, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        inputs = sorted({(head.blocks, head.pool) for head in grid}, key=_place)
        rates = sorted({head.lr for head in grid})
        self.heads = [[Head(*each, lr) for lr in rates] for each in inputs]
        if len(grid) != len(inputs) * len(rates) or set(grid) != set(chain(*self.heads)):
            raise ValueError("Every input of the grid must have the same learning rates.")
        self.width, self.most, self.classes, self.many = width, most, classes, many
        own = classes * len(rates)  # columns of an input
        self.parts = [
            (slice(top * width, stop * width), slice(min(users) * own, (max(users) + 1) * own))
            for top, stop, users in _parts(inputs, most)
        ]
        shape = ((most + 1) * width, len(inputs) * own)
        self.weight = torch.zeros(shape, device=device)  # 0 where an input does not see a row
        self.bias = torch.zeros(shape[1], device=device)
        self.momentum = torch.zeros(shape[0] + 1, shape[1], device=device)  # of weight; last, of bias
        self.rates = (torch.tensor(rates) * batch / 256).repeat(classes * len(inputs)).to(device)
        for head in grid:
            self._of(head).copy_(_first_weights(head, len(self._of(head)), classes, seed))

    def logits(self, x: Tensor) -> Tensor:
        """Rows (b, W) -> (b, I, C, R)."""
        done = self.bias.repeat(len(x), 1)
        for rows, columns in self.parts:
            done[:, columns].addmm_(x[:, rows], self.weight[rows, columns])
        return done.unflatten(1, (len(self.heads), self.classes, -1))

    def step(self, x: Tensor, y: Tensor, images: int, momentum: float, factor: float) -> None:
        """One step of SGD, of every head, on the mean of its own loss.

        Args:
            x: (b, W) float32, this process's rows.
            y: (b,) int64 classes; or if an image may have many, (b, C) of 0 and 1.
            images: rows of all processes.
            momentum: of SGD.
            factor: on the learning rates: where on the schedule this step is.
        """
        target = y.float() if self.many else F.one_hot(y, self.classes).float()
        logits = self.logits(x)  # what follows is the loss's derivative by them
        slope = logits.sigmoid_() if self.many else logits.softmax(dim=2)
        slope = slope.sub_(target[:, None, :, None]).flatten(1)
        # Each process adds its rows' part to its share of the old value, and the parts are summed.
        share = {"beta": momentum / world_size(), "alpha": 1 / images}
        for rows, columns in self.parts:
            self.momentum[rows, columns].addmm_(x[:, rows].T, slope[:, columns], **share)
        self.momentum[-1:].addmm_(x.new_ones(1, len(x)), slope, **share)
        all_reduce_sum(self.momentum)
        rates = self.rates * -factor
        self.weight.addcmul_(self.momentum[:-1], rates)
        self.bias.addcmul_(self.momentum[-1], rates)

    def each(self) -> Iterator[tuple[Head, Tensor, Tensor]]:
        """Head, weight (C, w), bias (C,), as nn.Linear has them."""
        for head in chain(*self.heads):
            yield head, self._of(head).T.contiguous(), self.bias[self._columns(head)].clone()

    def logits_of(self, head: Head, x: Tensor) -> Tensor:
        """What one head says of rows (b, W): (b, C)."""
        return x[:, self._rows(head)] @ self._of(head) + self.bias[self._columns(head)]

    def right(self, x: Tensor, y: Tensor, rows: int) -> dict[Head, tuple[float, float]]:
        """How good each head is on rows (n, W) with classes (n,), a number of rows at a time.

        Returns:
            The share of rows whose class it puts first, and minus its mean cross-entropy, which tells apart
            heads that get as many right; (-1, -inf) of a head that is not finite.
        """
        first = torch.zeros(len(self.heads), len(self.heads[0]), device=x.device)  # (I, R)
        likely = torch.zeros_like(first)
        for part, own in zip(x.split(rows), y.split(rows), strict=True):
            logits = self.logits(part)
            first += (logits.argmax(dim=2) == own[:, None, None]).sum(dim=0)
            own = own[:, None, None, None].expand(-1, *first.shape[:1], 1, first.shape[1])
            likely += logits.log_softmax(dim=2).gather(2, own).sum(dim=(0, 2))
        both = torch.stack([first, likely], dim=2).flatten(0, 1).cpu().double().div(len(y)).tolist()
        return {
            head: (share, log) if math.isfinite(log) else (-1.0, -math.inf)
            for head, (share, log) in zip(chain(*self.heads), both, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """What load() takes."""
        return {"weight": self.weight, "bias": self.bias, "momentum": self.momentum}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same grid."""
        for name, own in self.state().items():
            own.copy_(state[name])

    def _rows(self, head: Head) -> slice:
        return slice((self.most - head.blocks) * self.width, (self.most + head.pool) * self.width)

    def _columns(self, head: Head) -> slice:
        """Class by class, and not head by head: a softmax over a dimension that is not the last is faster."""
        number = next(i for i, heads in enumerate(self.heads) if head in heads)
        own = self.classes * len(self.heads[0])
        place = self.heads[number].index(head)
        return slice(number * own + place, (number + 1) * own, len(self.heads[0]))

    def _of(self, head: Head) -> Tensor:
        """Its weight (w, C), where it lies."""
        return self.weight[self._rows(head), self._columns(head)]


def _place(inputs: tuple[int, bool]) -> tuple[bool, int]:
    """Where an input stands: without pool the fewest blocks first, and with it the most.

    So those that see a block stand side by side, and so do those that see the mean patch.
    """
    blocks, pool = inputs
    return pool, -blocks if pool else blocks


def _parts(inputs: Sequence[tuple[int, bool]], most: int) -> Iterator[tuple[int, int, list[int]]]:
    """Blocks from which, up to which, the same inputs see a row, and their numbers; last, the mean patch."""
    counts = sorted({blocks for blocks, _ in inputs}, reverse=True)
    for blocks, fewer in zip(counts, [*counts[1:], 0], strict=True):
        yield most - blocks, most - fewer, [i for i, each in enumerate(inputs) if each[0] >= blocks]
    pooled = [i for i, each in enumerate(inputs) if each[1]]
    if pooled:
        yield most, most + 1, pooled


def _first_weights(head: Head, width: int, classes: int, seed: int) -> Tensor:
    """(w, C), normal with deviation 0.01."""
    key = hash_key(seed, head.blocks, head.pool, round(head.lr * 1e9))
    return torch.randn(width, classes, generator=torch.Generator().manual_seed(key)) * 0.01
