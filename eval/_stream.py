"""Training batches for classifiers on frozen features: each image once a pass, every pass shuffled.

Which images a step shows is a function of (seed, step) alone, so training that was stopped goes on as if it
had not been.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dinokit.data.loader import image_loader
from dinokit.data.sampler import hash_key
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import RandomResizedCrop
from dinokit.features import Pooling, device_of, frozen, normalised
from dinokit.models import Backbone
from dinokit.runtime.distributed import rank, world_size


class Order:
    """Which of `count` images, in which of the passes, this process sees in a step.

    Args:
        count: images.
        batch: a step, over all processes.
        seed: of the shuffling.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self._last = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> list[tuple[int, Tensor]]:
        """(pass, images (n,)) for each pass that the step has a part in."""
        start, stop = step * self.batch, (step + 1) * self.batch
        done = []
        for number in range(start // self.count, (stop - 1) // self.count + 1):
            begin = number * self.count
            share = slice(max(start - begin, 0), min(stop - begin, self.count))
            done.append((number, self._shuffled(number)[share][rank() :: world_size()]))
        return done

    def _shuffled(self, number: int) -> Tensor:
        if self._last[0] != number:
            rng = torch.Generator().manual_seed(hash_key(self.seed, number))
            self._last = number, torch.randperm(self.count, generator=rng)
        return self._last[1]


def cached_batches(
    views: Sequence[Tensor], y: Tensor, rows: Tensor, order: Order, start: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of steps `start` to `steps` - 1.

    Args:
        views: features (N, W) of the images, seen one way or another: pass i has view i modulo their number.
        y: (N, ...) targets.
        rows: which of the N are in `order`.
        order: which of these.
        start: the first step.
        steps: the step to stop before.
    """
    for step in range(start, steps):
        parts = [(views[number % len(views)], rows[places].to(y.device)) for number, places in order(step)]
        x = [view[places] for view, places in parts]
        where = torch.cat([places for _, places in parts])
        yield x[0] if len(x) == 1 else torch.cat(x), y[where]  # cat() would copy even one


def online_batches(
    backbone: Backbone, source: ImageSource, places: Tensor, cut: RandomResizedCrop, reading: Pooling,
    target: Callable[[Tensor, Tensor], Tensor], order: Order, start: int, steps: int,
    batch: int, workers: int, precision: torch.dtype | None, lost: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """The same, each image cut and seen anew every time.

    Args:
        backbone: what sees it.
        source: of the images.
        places: (N,) which of them are in `order`.
        cut: how one is cut.
        reading: what is kept of the tokens.
        target: from labels and places in the source, (b,) each, to targets (b, ...).
        order: which images.
        start: the first step.
        steps: the step to stop before.
        batch: images that the backbone sees at a time.
        workers: loader processes.
        precision: of the backbone.
        lost: (len(source),) where 1 is written for an image that cannot be read.

    Raises:
        ValueError: if no image of a step can be read, or features are not finite.
    """
    device = device_of(backbone)
    wanted = (
        [(place, number) for number, rows in order(step) for place in places[rows].tolist()]
        for step in range(start, steps)
    )
    for part in image_loader(source, cut, _Batches(wanted, steps - start), workers):
        lost[part.indices[~part.valid]] = 1
        if len(part.valid) and not part.groups:
            raise ValueError(
                f"None of the {len(part.valid)} images of a step can be read, such as {part.unreadable[0]}."
            )
        rows = [torch.empty(0, reading.width(backbone), device=device)]
        with frozen(backbone), torch.inference_mode():
            for crops in (crops for images, _ in part.groups for crops in images.split(batch)):
                pixels = normalised(backbone, crops.to(device))
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    rows.append(reading(backbone, pixels))
            x = torch.cat(rows)
        if not x.isfinite().all():
            raise ValueError(
                "Features are not finite: the weights are broken, or the precision is too narrow."
            )
        yield x, target(part.labels[part.valid], part.indices[part.valid]).to(device)


class _Batches:
    """Batches made one after another, whose number is known."""

    def __init__(self, batches: Iterator[list[tuple[int, int]]], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches
