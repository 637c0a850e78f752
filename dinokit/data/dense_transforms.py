"""From an image and its map to what a dense head is trained on: geometry and colour, in the worker.

C  channels     H, W  of the image     S  side of a square crop
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinokit.data.dense import IGNORE
from dinokit.data.sources import ImageLike
from dinokit.data.transforms import to_tensor, to_uint8

Pair = tuple[Tensor, Tensor]  # image (C, H, W) float32 in [0, 1], map (H, W)

TRIES = 10  # crops drawn before one with a class beyond its cap is taken
# What is kept of an image of H x W, as top, bottom, left, right: NYU's photos have a white rim, and KITTI's
# are brought to one size, 352 x 1216 at the bottom.
BORDERS = {
    "none": lambda h, w: (0, h, 0, w),
    "nyu": lambda h, w: (45, min(472, h), 43, min(608, w)),
    "kitti": lambda h, w: (max(h - 352, 0), h, max((w - 1216) // 2, 0), max((w - 1216) // 2, 0) + 1216),
}
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 180  # of photometric distortion, all +-


def to_tensors(image: ImageLike, target: np.ndarray) -> Pair:
    """An image and its map as tensors."""
    pixels = to_tensor(image)[0]
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    return pixels.contiguous(), torch.from_numpy(np.ascontiguousarray(target))


def shorter_side_to(pixels: Tensor, size: int) -> tuple[int, int]:
    """Height and width of an image (C, H, W) once its shorter side is `size`."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    return max(1, round(size * height / short)), max(1, round(size * width / short))


def resize_image(pixels: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) -> (C, height, width), bilinear without antialiasing, as the published protocols have it."""
    return F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False)[0]


def resize_map(target: Tensor, height: int, width: int) -> Tensor:
    """(H, W) -> (height, width): the value of the nearest pixel above and to the left."""
    return F.interpolate(target[None, None].float(), (height, width), mode="nearest")[0, 0].to(target.dtype)


@dataclass(frozen=True)
class SegmentationTransform:
    """Random resize, crop with a cap on the largest class, mirror image, photometric distortion.

    The recipe of DINOv2's segmentation heads (arXiv 2304.07193, section 7.4) in MMSegmentation's numbers.
    """

    resize: int  # pixels: the shorter side, times a number from `ratio`
    ratio: tuple[float, float]
    crop: int  # S, pixels
    fill: tuple[float, ...]  # C numbers in [0, 1]: the colour beyond an image that is smaller than S
    cap: float = 0.75  # most that one class may have of a crop's judged pixels
    flip: float = 0.5
    distort: bool = True

    def __call__(self, image: ImageLike, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """Image (C, S, S) uint8, map (S, S)."""
        pixels, ids = to_tensors(image, target)
        size = shorter_side_to(pixels, max(1, round(self.resize * rng.uniform(*self.ratio))))
        pixels, ids = resize_image(pixels, *size), resize_map(ids, *size)
        top, left = self._place(ids, rng)
        pixels = pixels[:, top : top + self.crop, left : left + self.crop]
        ids = ids[top : top + self.crop, left : left + self.crop]
        if rng.random() < self.flip:
            pixels, ids = pixels.flip(-1), ids.flip(-1)
        if self.distort:
            pixels = photometric_distortion(pixels, rng)
        return to_uint8(pad_image(pixels, self.crop, self.fill)), pad_map(ids, self.crop, IGNORE)

    def _place(self, ids: Tensor, rng: np.random.Generator) -> tuple[int, int]:
        room = [max(side - self.crop, 0) for side in ids.shape]
        place = (0, 0)
        for _ in range(TRIES):
            place = (int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1)))
            part = ids[place[0] : place[0] + self.crop, place[1] : place[1] + self.crop]
            counts = part[part != IGNORE].flatten().bincount()
            if (counts > 0).sum() > 1 and counts.max() < self.cap * counts.sum():
                break
        return place


@dataclass(frozen=True)
class DepthTransform:
    """Rotation, mirror image, crop, and colour, for depth: the recipe of DINOv2's heads (section 7.4)."""

    resize: int  # pixels of the shorter side before all else; 0: as stored
    border: str  # what is cut off the stored image, a key of BORDERS
    crop: tuple[int, int]  # height, width
    fill: tuple[float, ...]  # as in SegmentationTransform
    rotate: float = 2.5  # degrees, at most, for half of the images
    flip: float = 0.5
    brightness: float = 0.25  # at most, for half of the images, with gamma and colour by a tenth

    def __call__(self, image: ImageLike, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """Image (C, height, width) uint8, depth (height, width) float32 metres."""
        pixels, depth = to_tensors(image, target)
        top, bottom, left, right = BORDERS[self.border](*depth.shape)
        pixels, depth = pixels[:, top:bottom, left:right], depth[top:bottom, left:right]
        if self.resize:
            size = shorter_side_to(pixels, self.resize)
            pixels, depth = resize_image(pixels, *size), resize_map(depth, *size)
        if self.rotate and rng.random() < 0.5:
            angle = float(rng.uniform(-self.rotate, self.rotate))
            pixels = tv.rotate(pixels, angle, InterpolationMode.BILINEAR)
            depth = tv.rotate(depth[None], angle, InterpolationMode.NEAREST)[0]
        if rng.random() < self.flip:
            pixels, depth = pixels.flip(-1), depth.flip(-1)
        height, width = (min(a, b) for a, b in zip(self.crop, depth.shape, strict=True))
        top, left = (
            int(rng.integers(side - part + 1))
            for side, part in zip(depth.shape, (height, width), strict=True)
        )
        pixels = pixels[:, top : top + height, left : left + width]
        depth = depth[top : top + height, left : left + width]
        if self.brightness and rng.random() < 0.5:
            gamma, bright = rng.uniform(0.9, 1.1), rng.uniform(1 - self.brightness, 1 + self.brightness)
            tint = torch.from_numpy(rng.uniform(0.9, 1.1, len(pixels)).astype(np.float32))
            pixels = (pixels**gamma * bright * tint[:, None, None]).clamp(0, 1)
        return to_uint8(pad_image(pixels, self.crop, self.fill)), pad_map(depth, self.crop, 0)


def photometric_distortion(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of (C, H, W), each for half of the images.

    Contrast and brightness here are a product and a sum; contrast comes before or after the colours (SSD,
    arXiv 1512.02325). Images without three channels keep their colour.
    """
    x = pixels
    if rng.random() < 0.5:
        x = (x + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 1)
    contrast_first, contrast = rng.random() < 0.5, rng.random() < 0.5
    factor = rng.uniform(1 - CONTRAST, 1 + CONTRAST)
    if contrast and contrast_first:
        x = (x * factor).clamp(0, 1)
    saturate, saturation = rng.random() < 0.5, rng.uniform(1 - SATURATION, 1 + SATURATION)
    turn, hue = rng.random() < 0.5, rng.uniform(-HUE, HUE)
    if len(x) == 3:
        x = _saturated(x, saturation) if saturate else x
        x = tv.adjust_hue(x, hue) if turn else x
    if contrast and not contrast_first:
        x = (x * factor).clamp(0, 1)
    return x


def pad_image(pixels: Tensor, size: int | tuple[int, int], fill: tuple[float, ...]) -> Tensor:
    """(C, H, W) as (C, *size), with `fill` below and to the right of what there is."""
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.shape[1:] == (height, width):
        return pixels
    done = torch.tensor(fill).view(-1, 1, 1).repeat(1, height, width)
    done[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return done


def pad_map(target: Tensor, size: int | tuple[int, int], value: int) -> Tensor:
    """(H, W) as `size`, with `value` below and to the right of what there is."""
    height, width = (size, size) if isinstance(size, int) else size
    missing = (0, width - target.shape[1], 0, height - target.shape[0])
    return F.pad(target, missing, value=value).contiguous()


def _saturated(x: Tensor, factor: float) -> Tensor:
    """HSV's saturation times `factor`, hue and value kept: channels move away from the largest one."""
    high = x.amax(dim=0, keepdim=True)
    chroma = high - x.amin(dim=0, keepdim=True)
    most = high / chroma.clamp_min(1e-8)  # the factor that makes the saturation 1
    return high - (high - x) * most.clamp_max(factor)
