"""Images as a backbone is shown them for use: the middle, or the whole of them, on a grid of whole patches.

b  images of a batch     C  channels     h, w  pixels of an image, multiples of the patch
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dinokit.data.batch import stack
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.data.transforms import center_crop, resize, to_tensor
from dinokit.data.workers import UNREADABLE, data_loader


@dataclass(frozen=True)
class FitTransform:
    """How an image becomes one that can be cut in patches.

    crop: the shorter side to `resize`, and of that the middle, `size` x `size`. pad, resize: the whole image,
    its longer side at `size` (0: as it is); then to the next multiple of the patch, by black at the right and
    the bottom (pad), or each side resized to the nearest multiple (resize).
    """

    how: Literal["crop", "pad", "resize"]
    size: int  # pixels
    resize: int  # pixels; read by crop alone
    patch: int  # pixels

    def __call__(self, image: ImageLike) -> Tensor:
        """(C, h, w) uint8, or float32 in [0, 1]."""
        if self.how == "crop":
            return center_crop(image, self.resize, self.size)
        pixels = to_tensor(image)
        height, width = pixels.shape[2:]
        scale = self.size / max(height, width) if self.size else 1.0
        sides = [max(round(side * scale), 1) for side in (height, width)]
        if self.how == "resize":
            return resize(pixels, *(max(round(side / self.patch), 1) * self.patch for side in sides))[0]
        rows, columns = (-side % self.patch for side in sides)
        return F.pad(resize(pixels, *sides), (0, columns, 0, rows))[0]


@dataclass
class WholeBatch:
    """Some images in a row of a source, those of one shape together."""

    start: int  # number of the first in the source
    labels: Tensor  # (b,) int64; -1 without one, and where the image is unreadable
    groups: list[tuple[Tensor, Tensor]]  # crops (g, C, h, w), and their places (g,) in the batch
    unreadable: list[str]  # what is wrong, an image each


def whole_loader(
    source: ImageSource, fit: FitTransform, ranges: Iterable[range], batch: int, workers: int, pin: bool
) -> Iterable[WholeBatch]:
    """The images of each range in order, `batch` at a time; no batch has images of two ranges."""
    return data_loader(_Fitted(source, fit), _Batches(list(ranges), batch), _collate, workers, pin)


class _Fitted(Dataset[tuple[int, Tensor | None, int, str]]):
    """Number, pixels, label, and what is wrong with each image; no pixels if it is unreadable."""

    def __init__(self, source: ImageSource, fit: FitTransform) -> None:
        self.source, self.fit = source, fit

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, int, str]:
        try:
            image, label = self.source[index]
            return index, self.fit(image), label, ""
        except UNREADABLE as error:
            return index, None, -1, str(error) or self.source.name(index)


class _Batches:
    """The numbers of the images of each batch; made as they are asked for, because they may be millions."""

    def __init__(self, ranges: list[range], batch: int) -> None:
        self.ranges, self.batch = ranges, batch

    def __len__(self) -> int:
        return sum(-(-len(part) // self.batch) for part in self.ranges)

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.ranges:
            for start in range(0, len(part), self.batch):
                yield list(part[start : start + self.batch])


def _collate(rows: list[tuple[int, Tensor | None, int, str]]) -> WholeBatch:
    shapes: dict[torch.Size, list[int]] = {}
    for place, (_, pixels, _, _) in enumerate(rows):
        if pixels is not None:
            shapes.setdefault(pixels.shape, []).append(place)
    groups = [
        (stack([pixels for place in places if (pixels := rows[place][1]) is not None]), torch.tensor(places))
        for places in shapes.values()
    ]
    labels = torch.tensor([label for _, _, label, _ in rows])
    return WholeBatch(rows[0][0], labels, groups, [why for _, pixels, _, why in rows if pixels is None])
