"""Random transforms of an image and its map for training dense heads, in the loader's worker processes.

C  channels     H, W  of the image     S  side of a square crop
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinokit.data.decode import MAX_PIXELS, ImageLike
from dinokit.data.dense import IGNORE
from dinokit.data.transforms import to_tensor, to_uint8

Pair = tuple[Tensor, Tensor]  # image (C, H, W) float32 in [0, 1], map (H, W)

ATTEMPTS = 10  # crops drawn before one is used in which a class is above the cap
# The part of an image of H x W to use, as top, bottom, left, right: photos of NYU have a white border, and
# those of KITTI are cropped to one size, 352 x 1216 at the bottom.
BORDERS = {
    "none": lambda h, w: (0, h, 0, w),
    "nyu": lambda h, w: (45, min(472, h), 43, min(608, w)),
    "kitti": lambda h, w: (max(h - 352, 0), h, max((w - 1216) // 2, 0), max((w - 1216) // 2, 0) + 1216),
}
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 180  # photometric distortion, all +-


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
    if size * size * max(height, width) / short > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels is too thin to be resized to {size} pixels.")
    return max(1, round(size * height / short)), max(1, round(size * width / short))


def resize_image(pixels: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) -> (C, height, width), bilinear without antialiasing, as in the published protocols."""
    return F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False)[0]


def resize_map(target: Tensor, height: int, width: int) -> Tensor:
    """(H, W) -> (height, width): the value of the nearest pixel above and to the left."""
    return F.interpolate(target[None, None].float(), (height, width), mode="nearest")[0, 0].to(target.dtype)


@dataclass(frozen=True)
class SegmentationTransform:
    """Random resize, crop with a cap on the largest class, flip, photometric distortion.

    The recipe of DINOv2's segmentation heads (arXiv 2304.07193, section 7.4) with MMSegmentation's numbers.
    """

    resize: int  # pixels: the shorter side, times a random factor
    ratio: tuple[float, float]  # of the random factor
    crop: int  # S, pixels
    fill: tuple[float, ...]  # C numbers in [0, 1]: the colour beyond an image smaller than S
    cap: float = 0.75  # largest share of one class in the evaluated pixels of a crop
    flip: float = 0.5
    distort: bool = True

    def __call__(self, image: ImageLike, target: np.ndarray, rng: np.random.Generator) -> Pair:
        """Image (C, S, S) uint8, map (S, S)."""
        pixels, ids = to_tensors(image, target)
        size = shorter_side_to(pixels, max(1, round(self.resize * rng.uniform(*self.ratio))))
        pixels, ids = resize_image(pixels, *size), resize_map(ids, *size)
        top, left = self._crop_position(ids, rng)
        pixels = pixels[:, top : top + self.crop, left : left + self.crop]
        ids = ids[top : top + self.crop, left : left + self.crop]
        if rng.random() < self.flip:
            pixels, ids = pixels.flip(-1), ids.flip(-1)
        if self.distort:
            pixels = photometric_distortion(pixels, rng)
        return to_uint8(pad_image(pixels, self.crop, self.fill)), pad_map(ids, self.crop, IGNORE)

    def _crop_position(self, ids: Tensor, rng: np.random.Generator) -> tuple[int, int]:
        room = [max(side - self.crop, 0) for side in ids.shape]
        position = (0, 0)
        for _ in range(ATTEMPTS):
            position = (int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1)))
            crop = ids[position[0] : position[0] + self.crop, position[1] : position[1] + self.crop]
            counts = crop[crop != IGNORE].flatten().bincount()
            if (counts > 0).sum() > 1 and counts.max() < self.cap * counts.sum():
                break
        return position


@dataclass(frozen=True)
class DepthTransform:
    """Random rotation, flip, crop and colour, for depth: the recipe of DINOv2's heads (section 7.4)."""

    resize: int  # pixels of the shorter side, first of all; 0: as stored
    border: str  # of the stored image to cut off, a key of BORDERS
    crop: tuple[int, int]  # height, width
    fill: tuple[float, ...]  # as in SegmentationTransform
    rotate: float = 2.5  # largest angle in degrees, for half of the images
    flip: float = 0.5
    brightness: float = 0.25  # largest change, for half of the images, with gamma and tint by 0.1

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
            int(rng.integers(side - cut + 1)) for side, cut in zip(depth.shape, (height, width), strict=True)
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

    Contrast is a factor and brightness a sum; contrast comes before or after the colours (SSD, arXiv
    1512.02325). The colour of images with other than three channels does not change.
    """
    x = pixels
    if rng.random() < 0.5:
        x = (x + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 1)
    contrast_first, contrast = rng.random() < 0.5, rng.random() < 0.5
    factor = rng.uniform(1 - CONTRAST, 1 + CONTRAST)
    if contrast and contrast_first:
        x = (x * factor).clamp(0, 1)
    saturate, saturation = rng.random() < 0.5, rng.uniform(1 - SATURATION, 1 + SATURATION)
    rotate, hue = rng.random() < 0.5, rng.uniform(-HUE, HUE)
    if len(x) == 3:
        x = _adjust_saturation(x, saturation) if saturate else x
        x = tv.adjust_hue(x, hue) if rotate else x
    if contrast and not contrast_first:
        x = (x * factor).clamp(0, 1)
    return x


def pad_image(pixels: Tensor, size: int | tuple[int, int], fill: tuple[float, ...]) -> Tensor:
    """Pads (C, H, W) with `fill` at the bottom and the right to (C, *size)."""
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.shape[1:] == (height, width):
        return pixels
    padded = torch.tensor(fill).view(-1, 1, 1).repeat(1, height, width)
    padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return padded


def pad_map(target: Tensor, size: int | tuple[int, int], value: int) -> Tensor:
    """Pads (H, W) with `value` at the bottom and the right to `size`."""
    height, width = (size, size) if isinstance(size, int) else size
    missing = (0, width - target.shape[1], 0, height - target.shape[0])
    return F.pad(target, missing, value=value).contiguous()


def _adjust_saturation(x: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation of HSV by `factor`: channels move away from the largest one."""
    high = x.amax(dim=0, keepdim=True)
    chroma = high - x.amin(dim=0, keepdim=True)
    limit = high / chroma.clamp_min(1e-8)  # the factor at which the saturation is 1
    return high - (high - x) * limit.clamp_max(factor)
