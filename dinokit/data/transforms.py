"""Crops and resizing: geometry of images, in the loader's worker processes.

Multi-crop (SwAV, arXiv 2006.09882; DINO, arXiv 2104.14294, section 3.1) takes a few large, global crops and
several small, local ones of each image. Resizing is bicubic with antialiasing (a = -0.5, as in Pillow), by
torch: on 8-bit rows as they lie in an image it is five times faster than Pillow.

Letters: G global crops, L local crops, C channels, S and s their sizes in pixels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dinokit.config.load import CropGroup, Crops
from dinokit.data.decode import MAX_PIXELS, ImageLike, Orient, as_image, decode, jpeg_size
from dinokit.data.sampler import generator

ATTEMPTS = 10  # random boxes tried before the centre of the image is taken
# The factor by which an image that is decoded at a reduced size is still resized, at least. The resizing
# filter then passes only frequencies below half of those that libjpeg keeps, where both decodings agree; with
# a factor of 1 the error is two to four times as large.
LEAST_RESIZE = 2.0
THIN = 16  # longer side over shorter side, at most: an image is cut to this before it is resized
_STREAM = 7  # of random numbers for evaluation; training uses 0 to 2

Transform = Callable[[ImageLike, int, int], Tensor]  # (image, its index, draw) -> (C, height, width)
Boxes = Mapping[int, tuple[float, float, float, float]]  # by index: left, top, right, bottom, in pixels


class Box(NamedTuple):
    """The part of an image that a crop shows, in pixels, and how it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flips: tuple[int, ...]  # axes of (C, S, S)
    transpose: bool = False  # rows become columns, after the flips


class CropBoxes(NamedTuple):
    """Boxes of the global and of the local crops of one image."""

    globals: list[Box]
    locals: list[Box]


class MultiCrop:
    """Draws the boxes of global and local crops, and cuts and resizes the crops."""

    def __init__(self, cfg: Crops) -> None:
        self.cfg = cfg

    def draw(self, width: int, height: int, rng: np.random.Generator) -> CropBoxes:
        """Random boxes in an image of that size. The number of random draws does not depend on the size."""
        return CropBoxes(
            self._draw(width, height, self.cfg.globals, rng), self._draw(width, height, self.cfg.locals, rng)
        )

    def _draw(self, width: int, height: int, group: CropGroup, rng: np.random.Generator) -> list[Box]:
        boxes = []
        for _ in range(group.count):
            mirror, vertical, *draws = rng.random(2 + 2 * ATTEMPTS + 2).tolist()
            flips = (2,) * (mirror < self.cfg.flip) + (1,) * (vertical < self.cfg.vertical_flip)
            # A draw more only where it is used: other recipes keep their random numbers.
            transpose = bool(self.cfg.transpose) and rng.random() < self.cfg.transpose
            box = random_box(width, height, group.scale, self.cfg.ratio, draws)
            boxes.append(Box(*box, flips, transpose))
        return boxes

    def __call__(self, image: ImageLike, boxes: CropBoxes) -> tuple[Tensor, Tensor]:
        """Returns (G, C, S, S) and (L, C, s, s): uint8, or float32 in [0, 1] if the image is no uint8.

        Raises:
            ValueError: if the number of channels differs from that of `crops.mean`.
        """
        pixels = to_tensor(image)
        channels = len(self.cfg.mean)
        if pixels.shape[1] != channels:
            raise ValueError(
                f"the image has {pixels.shape[1]} channels, crops.mean and crops.std have {channels}: "
                f"give one number per channel, or let the data source convert the image."
            )
        cfg = self.cfg
        return _cut(pixels, cfg.globals.size, boxes.globals), _cut(pixels, cfg.locals.size, boxes.locals)

    def gram(self, image: ImageLike, boxes: CropBoxes) -> Tensor:
        """The global crops at `crops.gram_size`, (G, C, Z, Z); __call__ checks the image."""
        return _cut(to_tensor(image), self.cfg.gram_size, boxes.globals)


def _cut(pixels: Tensor, size: int, boxes: list[Box]) -> Tensor:
    crops = torch.empty(len(boxes), pixels.shape[1], size, size, dtype=pixels.dtype)
    for crop, (left, top, width, height, flips, transpose) in zip(crops, boxes, strict=True):
        resized = resize(pixels[:, :, top : top + height, left : left + width], size, size)[0]
        resized = resized.flip(flips) if flips else resized
        crop.copy_(resized.mT if transpose else resized)
    return crops


def decode_reduced(
    data: bytes,
    name: str,
    crop: MultiCrop,
    rng: np.random.Generator,
    max_pixels: int = MAX_PIXELS,
    orient: Orient = "exif",
) -> tuple[ImageLike, CropBoxes]:
    """A JPEG decoded at 1/2, 1/4 or 1/8 of its size where its crops allow it, and the boxes in that image.

    The boxes are drawn for the full size, which the header gives, so they are the same as for full
    decoding. docs/performance.md has the gain in speed and the change of the pixels.

    Args:
        data: the whole file; other formats than JPEG are decoded at full size.
        name: what to call it in messages.
        crop: draws the boxes.
        rng: as many numbers are drawn as for a full decoding.
        max_pixels: as decode().
        orient: as decode().

    Raises:
        ValueError: as decode().
    """
    channels = len(crop.cfg.mean)
    size = jpeg_size(data, orient)
    if size is None:
        image = decode(data, name, channels, max_pixels=max_pixels, orient=orient)
        return image, crop.draw(*size_of(image), rng)
    boxes = crop.draw(*size, rng)
    reduction = largest_reduction(boxes, crop.cfg)
    return decode(data, name, channels, reduction, max_pixels, orient), reduce_boxes(boxes, reduction)


def largest_reduction(boxes: CropBoxes, cfg: Crops) -> int:
    """The factor, 8, 4, 2 or 1, by which the sides may be reduced with every crop still made smaller."""
    sizes = max(cfg.globals.size, cfg.gram_size), cfg.locals.size
    least = min(
        min(box.width, box.height) / size for size, drawn in zip(sizes, boxes, strict=True) for box in drawn
    )
    return next((factor for factor in (8, 4, 2) if least >= LEAST_RESIZE * factor), 1)


def reduce_boxes(boxes: CropBoxes, reduction: int) -> CropBoxes:
    """Boxes of the full image, to the nearest pixels of an image whose sides are divided by `reduction`."""
    return CropBoxes(*([_reduce_box(box, reduction) for box in group] for group in boxes))


def _reduce_box(box: Box, reduction: int) -> Box:
    left, top = round(box.left / reduction), round(box.top / reduction)
    right = round((box.left + box.width) / reduction)
    bottom = round((box.top + box.height) / reduction)
    return box._replace(left=left, top=top, width=right - left, height=bottom - top)


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: list[float]
) -> tuple[int, int, int, int]:
    """A random box (left, top, width, height), by the rule of Inception's crops (arXiv 1409.4842, section 6).

    The share of the area is uniform in `scale`, the logarithm of width / height uniform in that of `ratio`.
    If none of ten boxes fits into the image, the result is the largest centred box with a shape in `ratio`.
    torchvision's RandomResizedCrop does the same with torch's global random numbers.

    Args:
        width: of the image, in pixels.
        height: of the image.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        draws: numbers in [0, 1): two for each attempt, then two for the position.
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


@dataclass(frozen=True)
class CenterCrop:
    """Resizes the shorter side to `resize`, then cuts out the centre; the same in every draw."""

    resize: int  # pixels
    size: int  # pixels

    def __call__(self, image: ImageLike, index: int = 0, draw: int = 0) -> Tensor:
        return center_crop(image, self.resize, self.size)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box, resized and randomly mirrored: how DINO and DINOv2 train their linear classifiers.

    The box is a function of (seed, draw, index) alone.
    """

    size: int  # pixels
    seed: int = 0
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    flip: float = 0.5  # probability

    def __call__(self, image: ImageLike, index: int, draw: int) -> Tensor:
        pixels = to_tensor(image)
        height, width = pixels.shape[2:]
        mirror, *draws = generator(self.seed, draw, index, _STREAM).random(1 + 2 * ATTEMPTS + 2).tolist()
        left, top, w, h = random_box(width, height, self.scale, self.ratio, draws)
        resized = resize(pixels[:, :, top : top + h, left : left + w], self.size, self.size)[0]
        return (resized.flip(2) if mirror < self.flip else resized).contiguous()


@dataclass(frozen=True)
class ResizeLongerSide:
    """Resizes the longer side of an image, or of a box in it, to `longest`, then cuts it to whole patches."""

    longest: int  # pixels
    patch: int  # pixels
    boxes: Boxes = field(default_factory=dict)

    def __call__(self, image: ImageLike, index: int, draw: int = 0) -> Tensor:
        pixels = to_tensor(image)
        if index in self.boxes:
            left, top, right, bottom = (round(edge) for edge in self.boxes[index])
            pixels = pixels[:, :, max(top, 0) : bottom, max(left, 0) : right]
            if 0 in pixels.shape:
                raise ValueError(f"the box {self.boxes[index]} has no pixel of image {index} in it")
        sides = [side * self.longest / max(pixels.shape[2:]) for side in pixels.shape[2:]]
        height, width = (max(self.patch, round(side)) for side in sides)
        pixels = resize(pixels, height, width)[0]
        return pixels[:, : height // self.patch * self.patch, : width // self.patch * self.patch].contiguous()


@dataclass(frozen=True)
class FitTransform:
    """Makes an image's sides multiples of the patch, in one of three ways.

    crop: resizes the shorter side to `resize` and cuts out the centre, `size` x `size`. pad, resize: resizes
    the longer side to `size` (0: not at all), then pads with black at the right and the bottom to the next
    multiple of the patch (pad), or resizes each side to the nearest multiple (resize).
    """

    how: Literal["crop", "pad", "resize"]
    size: int  # pixels
    resize: int  # pixels; used by crop alone
    patch: int  # pixels

    def __call__(self, image: ImageLike, index: int = 0, draw: int = 0) -> Tensor:
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


@dataclass(frozen=True)
class Preprocessing:
    """Makes the tensor that a backbone takes of an image: resized, cut and normalised.

    It can be the `transform` of a Dataset of torchvision.
    """

    fit: FitTransform
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any) -> Tensor:
        """A path, Pillow image, array or tensor -> (C, h, w) float32.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        x = self.fit(as_image(image, self.channels))
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


def center_crop(image: ImageLike, resize_to: int, size: int) -> Tensor:
    """Resizes the shorter side to `resize_to` and cuts out the centre: (C, size, size), dtype as MultiCrop.

    Raises:
        ValueError: if `resize_to` is smaller than `size`.
    """
    if resize_to < size:
        raise ValueError(f"resize={resize_to} leaves no crop of size={size}: it must be at least as large.")
    pixels = to_tensor(image)
    height, width = pixels.shape[2:]
    short = min(height, width)
    if max(height, width) > THIN * short:  # what lies far from the centre would only cost memory
        top, left = ((side - min(side, THIN * short)) // 2 for side in (height, width))
        pixels = pixels[:, :, top : height - top, left : width - left]
        height, width = pixels.shape[2:]
    pixels = resize(pixels, resize_to * height // short, resize_to * width // short)
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[0, :, top : top + size, left : left + size].contiguous()


def thumbnail(picture: ImageLike, side: int) -> Image.Image:
    """An RGB image, no side longer than `side` pixels.

    Of more than three channels the first three are shown, of 16 bits the upper 8.
    """
    if not isinstance(picture, Image.Image):
        array = picture[..., :3] if picture.shape[2] >= 3 else picture[..., :1].repeat(3, axis=2)
        top = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
        picture = Image.fromarray((array.astype(np.float32) * (255 / top)).astype(np.uint8))
    return ImageOps.contain(picture.convert("RGB"), (side, side))


def size_of(image: ImageLike) -> tuple[int, int]:
    """Width and height in pixels."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[:2]
    return width, height


def to_tensor(image: ImageLike) -> Tensor:
    """The image as (1, C, H, W), channels last in memory: uint8, or float32 in [0, 1].

    Raises:
        ValueError: for an array of another shape or type.
    """
    if issubclass(type(image), Tensor):  # of a source of another package: (C, H, W) would be (H, W, C)
        raise ValueError("an image must be a Pillow image or an array (H, W, C), not a tensor.")
    array = np.array(image, order="C")  # a copy, because torch needs writable memory
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
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


def to_uint8(pixels: Tensor) -> Tensor:
    """[0, 1] -> uint8, a quarter of the bytes to send from a worker."""
    return (pixels * 255).round_().clamp_(0, 255).byte()
