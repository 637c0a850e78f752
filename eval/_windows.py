"""A large image seen through windows of one size, as segmentation is tested."""

from collections.abc import Callable

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, bottom, right


def windows(height: int, width: int, crop: tuple[int, int], stride: tuple[int, int]) -> list[Box]:
    """Windows of `crop` (height, width) at every `stride`, the last ones moved back inside the image.

    All have one size: `crop`, or the image's where that is smaller.
    """
    tops, lefts = (
        [min(i * step, max(side - part, 0)) for i in range(-(-max(side - part, 0) // step) + 1)]
        for side, part, step in zip((height, width), crop, stride, strict=True)
    )
    h, w = min(crop[0], height), min(crop[1], width)
    return [(top, left, top + h, left + w) for top in tops for left in lefts]


def slide(image: Tensor, crop: int, stride: int, judge: Callable[[Tensor], Tensor], batch: int = 8) -> Tensor:
    """The mean, at every pixel, of what `judge` says of the windows that cover it.

    Args:
        image: (C, H, W).
        crop: pixels, the side of a window.
        stride: pixels between two windows.
        judge: (b, C, h, w) -> (b, K, h, w).
        batch: windows at a time.

    Returns:
        (K, H, W).
    """
    boxes = windows(image.shape[1], image.shape[2], (crop, crop), (stride, stride))
    total = counts = torch.zeros(())
    for start in range(0, len(boxes), batch):
        part = boxes[start : start + batch]
        said = judge(torch.stack([image[:, t:b, le:r] for t, le, b, r in part]))
        if start == 0:
            total = said.new_zeros(said.shape[1], *image.shape[1:])
            counts = said.new_zeros(image.shape[1:])
        for (t, le, b, r), logits in zip(part, said, strict=True):
            total[:, t:b, le:r] += logits
            counts[t:b, le:r] += 1
    return total / counts
