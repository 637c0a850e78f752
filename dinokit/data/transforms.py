"""Which box of the image each crop shows, and how it is resized: geometry only, in the worker, uint8 out.

Multi-crop (SwAV, arXiv 2006.09882; DINO, arXiv 2104.14294, section 3.1): a few large, global crops and
several small, local ones. Resizing is bicubic with antialiasing (a = -0.5, as Pillow's), by torch: on 8-bit
rows as they lie in an image it is five times faster than Pillow.

Letters: G global crops, L local crops, C channels, S and s their sizes in pixels.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinokit.config.load import CropGroup, Crops
from dinokit.data.sources import ImageLike

ATTEMPTS = 10  # boxes drawn before the middle of the image is taken


class Box(NamedTuple):
    """What a crop shows of an image, in pixels, and how it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flips: tuple[int, ...]  # axes of (C, S, S)


class CropBoxes(NamedTuple):
    """Of the global and of the local crops of an image."""

    globals: list[Box]
    locals: list[Box]


class MultiCrop:
    """Draws the global and the local crops of an image, and cuts them."""

    def __init__(self, cfg: Crops) -> None:
        self.cfg = cfg

    def draw(self, width: int, height: int, rng: np.random.Generator) -> CropBoxes:
        """Boxes in an image of that size. As many random numbers are drawn for any size."""
        return CropBoxes(
            self._draw(width, height, self.cfg.globals, rng), self._draw(width, height, self.cfg.locals, rng)
        )

    def _draw(self, width: int, height: int, group: CropGroup, rng: np.random.Generator) -> list[Box]:
        boxes = []
        for _ in range(group.count):
            mirror, vertical, *draws = rng.random(2 + 2 * ATTEMPTS + 2).tolist()
            flips = (2,) * (mirror < self.cfg.flip) + (1,) * (vertical < self.cfg.vertical_flip)
            boxes.append(Box(*random_box(width, height, group.scale, self.cfg.ratio, draws), flips))
        return boxes

    def __call__(self, image: ImageLike, boxes: CropBoxes) -> tuple[Tensor, Tensor]:
        """Returns (G, C, S, S) and (L, C, s, s); uint8, or float32 in [0, 1] of a uint16 or float32 image.

        Raises:
            ValueError: if the image has not as many channels as `crops.mean`.
        """
        pixels = to_tensor(image)
        channels = len(self.cfg.mean)
        if pixels.shape[1] != channels:
            raise ValueError(
                f"the image has {pixels.shape[1]} channels, crops.mean and crops.std have {channels}: "
                f"give one number a channel, or let the data source convert the image."
            )
        cfg = self.cfg
        return _cut(pixels, cfg.globals.size, boxes.globals), _cut(pixels, cfg.locals.size, boxes.locals)


def _cut(pixels: Tensor, size: int, boxes: list[Box]) -> Tensor:
    crops = torch.empty(len(boxes), pixels.shape[1], size, size, dtype=pixels.dtype)
    for crop, (left, top, width, height, flips) in zip(crops, boxes, strict=True):
        small = resize(pixels[:, :, top : top + height, left : left + width], size, size)[0]
        crop.copy_(small.flip(flips) if flips else small)
    return crops


def size_of(image: ImageLike) -> tuple[int, int]:
    """Width and height."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[:2]
    return width, height


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: list[float]
) -> tuple[int, int, int, int]:
    """A box (left, top, width, height) by the rule of Inception's crops (arXiv 1409.4842, section 6).

    Its share of the area is even in `scale`, its width over height even in the logarithm of `ratio`. If no
    box of ten lies within the image, it is the largest box in the middle whose shape is in `ratio`. `draws`
    are numbers in [0, 1): two an attempt, then two for the position.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(ATTEMPTS):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[2 * i])
        shape = math.exp(low + (high - low) * draws[2 * i + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int((width - w + 1) * draws[-2]), int((height - h + 1) * draws[-1]), w, h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def center_crop(image: ImageLike, resize_to: int, size: int) -> Tensor:
    """The shorter side to `resize_to`, then the middle. Returns (C, size, size), of a dtype as MultiCrop's.

    Raises:
        ValueError: if `resize_to` is smaller than `size`.
    """
    if resize_to < size:
        raise ValueError(f"resize={resize_to} leaves no crop of size={size}: it must be at least as large.")
    pixels = to_tensor(image)
    height, width = pixels.shape[2:]
    short = min(height, width)
    pixels = resize(pixels, resize_to * height // short, resize_to * width // short)
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[0, :, top : top + size, left : left + size].contiguous()


def to_tensor(image: ImageLike) -> Tensor:
    """The image as (1, C, H, W), channels last in memory: uint8, or float32 in [0, 1].

    Raises:
        ValueError: for an array of another shape or type.
    """
    array = np.array(image, order="C")  # a copy: what torch is given must be writable
    if isinstance(image, Image.Image) and array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(
            f"an image array must be (H, W, C) uint8, uint16 or float32 in [0, 1], "
            f"not {array.shape} {array.dtype}."
        )
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65_535
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased: (1, C, H, W) -> (1, C, height, width), of the same dtype and range."""
    if pixels.shape[2:] == (height, width):
        return pixels
    done = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return done.clamp_(0, 1) if done.is_floating_point() else done
