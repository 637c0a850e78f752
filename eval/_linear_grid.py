"""A grid of linear classifiers trained together in a few large matrix products, and their training batches.

Every row of features holds the class tokens of the last blocks, in the order of depth, and then the mean of
the last block's patches (features/tokens.py, Pooling). So the input of a head on the last n blocks, with or
without that mean, is a range of neighbouring columns, of which no copy is made. The weights of all heads are
one matrix. Its columns are ordered so that all heads that see a block, or the mean, are neighbours: one
product for each block serves them all. Heads share nothing else: each learns as in a training of its own.

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
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size


@dataclass(frozen=True)
class Head:
    """One classifier of the grid."""

    blocks: int  # its input has the class tokens of this many last blocks
    pool: bool  # and the mean of the last block's patches
    lr: float  # for a batch of 256


class LinearGrid:
    """A grid of heads: each input with each rate.

    Args:
        grid: the heads.
        width: of the backbone.
        max_blocks: class tokens in a row of features.
        classes: C.
        multi_label: whether an image may have several classes: then each class has a binary loss of its own.
        batch: images a step, which scales a head's rate.
        seed: of the initial weights; those of a head do not depend on the other heads.
        device: where to train.

    Raises:
        ValueError: if the inputs do not all have the same rates.
    """

    def __init__(
        self, grid: Sequence[Head], width: int, max_blocks: int, classes: int, multi_label: bool, batch: int,
        seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        inputs = sorted({(head.blocks, head.pool) for head in grid}, key=_input_order)
        rates = sorted({head.lr for head in grid})
        self.heads = [[Head(*each, lr) for lr in rates] for each in inputs]
        if len(grid) != len(inputs) * len(rates) or set(grid) != set(chain(*self.heads)):
            raise ValueError("Every input of the grid must have the same learning rates.")
        self.width, self.max_blocks, self.classes, self.multi_label = width, max_blocks, classes, multi_label
        columns = classes * len(rates)  # of an input
        # Each product: rows of the weight that the same inputs see, and the columns of these inputs.
        self.products = [
            (slice(start * width, stop * width), slice(min(seen) * columns, (max(seen) + 1) * columns))
            for start, stop, seen in _shared_rows(inputs, max_blocks)
        ]
        shape = ((max_blocks + 1) * width, len(inputs) * columns)
        self.weight = torch.zeros(shape, device=device)  # 0 where an input does not see a row
        self.bias = torch.zeros(shape[1], device=device)
        self.momentum = torch.zeros(shape[0] + 1, shape[1], device=device)  # of weight; last, of bias
        self.rates = (torch.tensor(rates) * batch / 256).repeat(classes * len(inputs)).to(device)
        for head in grid:
            weight = self._weight_of(head)
            weight.copy_(_initial_weight(head, len(weight), classes, seed))

    def logits(self, x: Tensor) -> Tensor:
        """Rows (b, W) -> (b, I, C, R)."""
        logits = self.bias.repeat(len(x), 1)
        for rows, columns in self.products:
            logits[:, columns].addmm_(x[:, rows], self.weight[rows, columns])
        return logits.unflatten(1, (len(self.heads), self.classes, -1))

    def step(self, x: Tensor, y: Tensor, images: int, momentum: float, factor: float) -> None:
        """One step of SGD, of every head, on the mean of its own loss.

        Args:
            x: (b, W) float32, this process's rows.
            y: (b,) int64 classes; or if an image may have several, (b, C) of 0 and 1.
            images: rows of all processes.
            momentum: of SGD.
            factor: of the schedule at this step, on the learning rates.
        """
        target = y.float() if self.multi_label else F.one_hot(y, self.classes).float()
        logits = self.logits(x)  # turned into the gradient of the loss with respect to them, in place
        gradient = logits.sigmoid_() if self.multi_label else logits.softmax(dim=2)
        gradient = gradient.sub_(target[:, None, :, None]).flatten(1)
        # Each process adds the gradient of its rows to 1 / world of the old momentum, and these are summed.
        factors = {"beta": momentum / world_size(), "alpha": 1 / images}
        for rows, columns in self.products:
            self.momentum[rows, columns].addmm_(x[:, rows].T, gradient[:, columns], **factors)
        self.momentum[-1:].addmm_(x.new_ones(1, len(x)), gradient, **factors)
        all_reduce_sum(self.momentum)
        rates = self.rates * -factor
        self.weight.addcmul_(self.momentum[:-1], rates)
        self.bias.addcmul_(self.momentum[-1], rates)

    def classifiers(self) -> Iterator[tuple[Head, Tensor, Tensor]]:
        """Head, weight (C, w), bias (C,), as nn.Linear has them."""
        for head in chain(*self.heads):
            yield head, *self.tensors_of(head)

    def tensors_of(self, head: Head) -> tuple[Tensor, Tensor]:
        """Weight (C, w) and bias (C,) of one head."""
        return self._weight_of(head).T.contiguous(), self.bias[self._columns(head)].clone()

    def logits_of(self, head: Head, x: Tensor) -> Tensor:
        """Logits of one head for rows (b, W): (b, C)."""
        return x[:, self._rows(head)] @ self._weight_of(head) + self.bias[self._columns(head)]

    def accuracies(self, x: Tensor, y: Tensor, rows: int) -> dict[Head, tuple[float, float]]:
        """Accuracy and log-likelihood of each head on x (n, W) with classes y (n,), `rows` of them at a time.

        Returns:
            Top-1, and minus the mean cross-entropy, which ranks heads of the same top-1; (-1, -inf) for a
            head that is not finite.
        """
        correct = torch.zeros(len(self.heads), len(self.heads[0]), device=x.device)  # (I, R)
        log_likelihood = torch.zeros_like(correct)
        for x_block, y_block in zip(x.split(rows), y.split(rows), strict=True):
            logits = self.logits(x_block)
            correct += (logits.argmax(dim=2) == y_block[:, None, None]).sum(dim=0)
            index = y_block[:, None, None, None].expand(-1, *correct.shape[:1], 1, correct.shape[1])
            log_likelihood += logits.log_softmax(dim=2).gather(2, index).sum(dim=(0, 2))
        both = torch.stack([correct, log_likelihood], dim=2).flatten(0, 1).cpu().double().div(len(y)).tolist()
        return {
            head: (share, log) if math.isfinite(log) else (-1.0, -math.inf)
            for head, (share, log) in zip(chain(*self.heads), both, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of the training, for load_state_dict()."""
        return {"weight": self.weight, "bias": self.bias, "momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of the same grid."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def _rows(self, head: Head) -> slice:
        return slice((self.max_blocks - head.blocks) * self.width, (self.max_blocks + head.pool) * self.width)

    def _columns(self, head: Head) -> slice:
        """Ordered by class, then by rate: a softmax over a dimension that is not the last is faster."""
        number = next(i for i, heads in enumerate(self.heads) if head in heads)
        columns = self.classes * len(self.heads[0])
        first = number * columns + self.heads[number].index(head)
        return slice(first, (number + 1) * columns, len(self.heads[0]))

    def _weight_of(self, head: Head) -> Tensor:
        """A view of its weight (w, C)."""
        return self.weight[self._rows(head), self._columns(head)]


def _input_order(inputs: tuple[int, bool]) -> tuple[bool, int]:
    """Sort key of inputs: without pool the fewest blocks first, and with it the most.

    So the inputs that see a block are neighbours, and so are those that see the mean patch.
    """
    blocks, pool = inputs
    return pool, -blocks if pool else blocks


def _shared_rows(inputs: Sequence[tuple[int, bool]], max_blocks: int) -> Iterator[tuple[int, int, list[int]]]:
    """First and last (exclusive) block that the same inputs see, and their numbers; then the mean patch."""
    counts = sorted({blocks for blocks, _ in inputs}, reverse=True)
    for blocks, fewer in zip(counts, [*counts[1:], 0], strict=True):
        seen = [i for i, each in enumerate(inputs) if each[0] >= blocks]
        yield max_blocks - blocks, max_blocks - fewer, seen
    pooled = [i for i, each in enumerate(inputs) if each[1]]
    if pooled:
        yield max_blocks, max_blocks + 1, pooled


def _initial_weight(head: Head, width: int, classes: int, seed: int) -> Tensor:
    """(w, C), normal with deviation 0.01."""
    key = hash_key(seed, head.blocks, head.pool, round(head.lr * 1e9))
    return torch.randn(width, classes, generator=torch.Generator().manual_seed(key)) * 0.01


class ImageOrder:
    """Which images this process sees in a step: each once an epoch, every epoch shuffled anew.

    The images of a step are a function of (seed, step) alone, so a training that was stopped resumes exactly.

    Args:
        count: images.
        batch: images a step, over all processes.
        seed: of the shuffling.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self._last = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> list[tuple[int, Tensor]]:
        """(epoch, images (n,)) for each epoch that the step has images of."""
        start, stop = step * self.batch, (step + 1) * self.batch
        result = []
        for epoch in range(start // self.count, (stop - 1) // self.count + 1):
            first = epoch * self.count
            share = slice(max(start - first, 0), min(stop - first, self.count))
            result.append((epoch, self._shuffled(epoch)[share][rank() :: world_size()]))
        return result

    def _shuffled(self, epoch: int) -> Tensor:
        if self._last[0] != epoch:
            rng = torch.Generator().manual_seed(hash_key(self.seed, epoch))
            self._last = epoch, torch.randperm(self.count, generator=rng)
        return self._last[1]


def cached_batches(
    views: Sequence[Tensor], y: Tensor, rows: Tensor, order: ImageOrder, start: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of steps `start` to `steps` - 1.

    `order` counts the `rows` of the features (N, W) and the targets (N, ...). The images may be given in
    several views: epoch i has view i modulo their number.
    """
    for step in range(start, steps):
        parts = [(views[epoch % len(views)], rows[images].to(y.device)) for epoch, images in order(step)]
        x = [view[indices] for view, indices in parts]
        indices = torch.cat([indices for _, indices in parts])
        yield x[0] if len(x) == 1 else torch.cat(x), y[indices]  # cat() would copy even a single one
