"""What an evaluator shows of an image: its middle, or a random part of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dinokit.data.sampler import generator
from dinokit.data.sources import ImageLike
from dinokit.data.transforms import ATTEMPTS, center_crop, random_box, resize, to_tensor

Transform = Callable[[ImageLike, int, int], Tensor]  # (image, its index, draw) -> (C, size, size)
Boxes = Mapping[int, tuple[float, float, float, float]]  # by image: left, top, right, bottom, in pixels
_STREAM = 7  # of random numbers; training's are the first three


@dataclass(frozen=True)
class CenterCrop:
    """The shorter side brought to `resize`, then the middle; the same in every draw."""

    resize: int  # pixels
    size: int  # pixels

    def __call__(self, image: ImageLike, index: int, draw: int) -> Tensor:
        return center_crop(image, self.resize, self.size)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box, resized, and mirrored half the time: how DINO and DINOv2 train their linear classifiers.

    Which box is a function of (seed, draw, index) alone.
    """

    size: int  # pixels
    seed: int = 0
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.75, 4 / 3)  # of width to height
    flip: float = 0.5  # probability

    def __call__(self, image: ImageLike, index: int, draw: int) -> Tensor:
        pixels = to_tensor(image)
        height, width = pixels.shape[2:]
        mirror, *draws = generator(self.seed, draw, index, _STREAM).random(1 + 2 * ATTEMPTS + 2).tolist()
        left, top, w, h = random_box(width, height, self.scale, self.ratio, draws)
        small = resize(pixels[:, :, top : top + h, left : left + w], self.size, self.size)[0]
        return (small.flip(2) if mirror < self.flip else small).contiguous()


@dataclass(frozen=True)
class ResizeLongerSide:
    """All of an image, or of its box, the longer side brought to `longest`, then cut to whole patches.

    Images of different shapes cannot share a batch.
    """

    longest: int  # pixels
    patch: int  # pixels
    boxes: Boxes = field(default_factory=dict)

    def __call__(self, image: ImageLike, index: int, draw: int) -> Tensor:
        pixels = to_tensor(image)
        if index in self.boxes:
            left, top, right, bottom = (round(edge) for edge in self.boxes[index])
            pixels = pixels[:, :, max(top, 0) : bottom, max(left, 0) : right]
            if 0 in pixels.shape:
                raise ValueError(f"the box {self.boxes[index]} holds nothing of image {index}")
        sides = [side * self.longest / max(pixels.shape[2:]) for side in pixels.shape[2:]]
        height, width = (max(self.patch, round(side)) for side in sides)
        pixels = resize(pixels, height, width)[0]
        return pixels[:, : height // self.patch * self.patch, : width // self.patch * self.patch].contiguous()
