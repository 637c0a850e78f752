"""A JPEG decoded at a half, a quarter or an eighth of its sides, where its crops are shrunk by more.

Boxes are drawn for the whole image, whose size its header gives, so they are those of a whole decoding. Then
the smallest size is taken that leaves each of them to be shrunk by LEAST in both directions, and the boxes
are moved to its nearest pixels. What it spares and what it changes: docs/performance.md.
"""

import numpy as np

from dinokit.config.load import Crops
from dinokit.data.decode import decode, jpeg_size
from dinokit.data.sources import ImageLike
from dinokit.data.transforms import Box, CropBoxes, MultiCrop, size_of

# The factor that is left to our own resizing. Its filter then passes only what lies below half of the
# frequencies that libjpeg kept, where the two agree; at 1 the error is two to four times as large.
LEAST = 2.0


def read_reduced(
    data: bytes, name: str, cut: MultiCrop, rng: np.random.Generator
) -> tuple[ImageLike, CropBoxes]:
    """The image in a file, as small as its crops allow, and where in it they lie.

    Args:
        data: the whole file; what is no JPEG is decoded whole.
        name: what to call it in messages.
        cut: draws the crops.
        rng: drawn from as for a whole decoding.

    Raises:
        ValueError: as decode().
    """
    channels = len(cut.cfg.mean)
    size = jpeg_size(data)
    if size is None:
        image = decode(data, name, channels)
        return image, cut.draw(*size_of(image), rng)
    boxes = cut.draw(*size, rng)
    part = smallest_part(boxes, cut.cfg)
    return decode(data, name, channels, part), moved(boxes, part)


def smallest_part(boxes: CropBoxes, cfg: Crops) -> int:
    """The part of its sides, 8, 4, 2 or 1 for all, that an image may be decoded at for these crops."""
    least = min(
        min(box.width, box.height) / group.size
        for group, drawn in zip((cfg.globals, cfg.locals), boxes, strict=True)
        for box in drawn
    )
    return next((part for part in (8, 4, 2) if least >= LEAST * part), 1)


def moved(boxes: CropBoxes, part: int) -> CropBoxes:
    """Boxes of the whole image, in an image decoded at a part of its sides, to the nearest pixels."""
    return CropBoxes(*([_moved(box, part) for box in group] for group in boxes))


def _moved(box: Box, part: int) -> Box:
    left, top = round(box.left / part), round(box.top / part)
    right, bottom = round((box.left + box.width) / part), round((box.top + box.height) / part)
    return Box(left, top, right - left, bottom - top, box.flips)
