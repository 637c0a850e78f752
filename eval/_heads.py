"""Many linear classifiers trained at once on the same features: one matrix product for all with one input.

Every row of features holds the class tokens of the last blocks, in the order of depth, and then the mean of
the last block's patches (features/reading.py). So the input of a head on the last n blocks, with or without
that mean, is a run of neighbouring columns, of which no copy is made, and the weights of all heads with the
same input lie side by side in one matrix. Heads share nothing else: each learns what it would learn alone.

    b  rows of a step     W  columns of a row     w  columns of an input     H  heads on it     C  classes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.order import hash_key
from dinokit.distributed import all_reduce_sum, world_size


@dataclass(frozen=True)
class Head:
    """One classifier of the grid."""

    blocks: int  # it sees the class tokens of so many last blocks
    pool: bool  # and the mean of the last block's patches
    lr: float  # for a batch of 256


class Group:
    """The heads on one input.

    Args:
        heads: which differ in their rate alone.
        columns: of the features.
        classes: C.
        many: whether an image may have many classes: then each is a binary question of its own.
        rates: learning rate of each head at the start.
        seed: of the first weights.
        device: where to train.
    """

    def __init__(
        self, heads: list[Head], columns: slice, classes: int, many: bool, rates: list[float], seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.heads, self.columns, self.classes, self.many = heads, columns, classes, many
        width = columns.stop - columns.start
        first = [_first_weights(head, width, classes, seed) for head in heads]
        # Class by class and not head by head: a softmax over a dimension that is not the last is the faster.
        self.weight = torch.stack(first, dim=2).flatten(1).to(device)  # (w, C * H)
        self.bias = torch.zeros(classes * len(heads), device=device)
        self.momentum = torch.zeros(
            width + 1, classes * len(heads), device=device
        )  # of weight; last, of bias
        self.rates = torch.tensor(rates, device=device).repeat(classes)

    def logits(self, x: Tensor) -> Tensor:
        """Rows (b, W) -> (b, C, H)."""
        return torch.addmm(self.bias, x[:, self.columns], self.weight).unflatten(1, (self.classes, -1))

    def step(self, x: Tensor, target: Tensor, images: int, momentum: float, factor: float) -> None:
        """One step of SGD on the mean over `images` of each head's own loss; of all processes together."""
        logits = self.logits(x)  # (b, C, H); what follows is the loss's derivative by them
        slope = logits.sigmoid_() if self.many else logits.softmax(dim=1)
        slope = slope.sub_(target[:, :, None]).flatten(1)
        rates = self.rates * -factor
        for parameter, moving, left in (
            (self.weight, self.momentum[:-1], x[:, self.columns].T),
            (self.bias[None], self.momentum[-1:], x.new_ones(1, len(x))),
        ):
            # Each process adds its rows' part to its share of the old value, and the parts are summed.
            torch.addmm(moving, left, slope, beta=momentum / world_size(), alpha=1 / images, out=moving)
            parameter.addcmul_(all_reduce_sum(moving), rates)

    def one(self, place: int) -> tuple[Tensor, Tensor]:
        """Weight (C, w) and bias (C,) of a head, as nn.Linear has them."""
        weight, bias = (
            each.unflatten(-1, (self.classes, -1))[..., place] for each in (self.weight, self.bias)
        )
        return weight.T.contiguous(), bias.contiguous()


class Heads:
    """A grid of heads.

    Args:
        grid: the heads.
        width: of the backbone.
        most: class tokens in a row of features.
        classes: C.
        many: whether an image may have many classes: then each is a binary question of its own.
        batch: images a step, by which a head's rate is scaled.
        seed: of the first weights; a head's do not depend on which others there are.
        device: where to train.
    """

    def __init__(
        self, grid: Sequence[Head], width: int, most: int, classes: int, many: bool, batch: int, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.classes, self.many = classes, many
        inputs = dict.fromkeys((head.blocks, head.pool) for head in grid)
        self.groups = []
        for blocks, pool in inputs:
            heads = [head for head in grid if (head.blocks, head.pool) == (blocks, pool)]
            columns = slice((most - blocks) * width, (most + pool) * width)
            rates = [head.lr * batch / 256 for head in heads]
            self.groups.append(Group(heads, columns, classes, many, rates, seed, device))

    def step(self, x: Tensor, y: Tensor, images: int, momentum: float, factor: float) -> None:
        """One step of every head.

        Args:
            x: (b, W) float32, this process's rows.
            y: (b,) int64 classes; or if an image may have many, (b, C) of 0 and 1.
            images: rows of all processes.
            momentum: of SGD.
            factor: on the learning rates: where on the schedule this step is.
        """
        target = y.float() if self.many else F.one_hot(y, self.classes).float()
        for group in self.groups:
            group.step(x, target, images, momentum, factor)

    def each(self) -> Iterator[tuple[Head, Tensor, Tensor]]:
        """Head, weight (C, w), bias (C,)."""
        for group in self.groups:
            for place, head in enumerate(group.heads):
                yield head, *group.one(place)

    def logits_of(self, head: Head, x: Tensor) -> Tensor:
        """What one head says of rows (b, W): (b, C)."""
        group = next(group for group in self.groups if head in group.heads)
        weight, bias = group.one(group.heads.index(head))
        return x[:, group.columns] @ weight.T + bias

    def right(self, x: Tensor, y: Tensor, rows: int) -> dict[Head, tuple[float, float]]:
        """How good each head is on rows (n, W) with classes (n,), a number of rows at a time.

        Returns:
            The share of rows whose class it puts first, and minus its mean cross-entropy, which tells apart
            heads that get as many right; (-1, -inf) of a head that is not finite.
        """
        done: dict[Head, tuple[float, float]] = {}
        for group in self.groups:
            first = torch.zeros(len(group.heads), device=x.device)
            likely = torch.zeros_like(first)
            for part, own in zip(x.split(rows), y.split(rows), strict=True):
                logits = group.logits(part)  # (b, C, H)
                first += (logits.argmax(dim=1) == own[:, None]).sum(dim=0)
                own = own[:, None, None].expand(-1, 1, len(group.heads))
                likely += logits.log_softmax(dim=1).gather(1, own).sum(dim=(0, 1))
            both = torch.stack([first, likely], dim=1).cpu().double().div(len(y)).tolist()
            for head, (share, log) in zip(group.heads, both, strict=True):
                done[head] = (share, log) if math.isfinite(log) else (-1.0, -math.inf)
        return done

    def state(self) -> dict[str, Any]:
        """What load() takes."""
        return {"groups": [[group.weight, group.bias, group.momentum] for group in self.groups]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same grid."""
        for group, kept in zip(self.groups, state["groups"], strict=True):
            for own, tensor in zip((group.weight, group.bias, group.momentum), kept, strict=True):
                own.copy_(tensor)


def _first_weights(head: Head, width: int, classes: int, seed: int) -> Tensor:
    """(w, C), normal with deviation 0.01."""
    key = hash_key(seed, head.blocks, head.pool, round(head.lr * 1e9))
    return torch.randn(width, classes, generator=torch.Generator().manual_seed(key)) * 0.01
