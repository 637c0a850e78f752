"""The patches of an image of any size, and where they lie in it."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dinokit.data.decode import ImageLike
from dinokit.data.dense_transforms import resize_image, shorter_side_to, to_tensors
from dinokit.eval._dense import DenseBackbone
from dinokit.features.extract import check_finite
from dinokit.features.tokens import padding


@dataclass(frozen=True)
class Grid:
    """Where the patches of an image lie. Points (..., 2) are x and y."""

    scale: np.ndarray  # (2,): patches per pixel of the image as stored
    offset: np.ndarray  # (2,): patches of padding at the left and at the top

    def to_patches(self, pixels: np.ndarray) -> np.ndarray:
        """Points in pixels of the image as stored, in patches; the first patch spans 0 to 1."""
        return pixels * self.scale + self.offset

    def to_pixels(self, patches: np.ndarray) -> np.ndarray:
        """The inverse of to_patches."""
        return (patches - self.offset) / self.scale


def patches_of(dense: DenseBackbone, image: ImageLike, resize: int) -> tuple[Tensor, Grid]:
    """Features (D, h, w) of the last of the blocks, and the grid, of an image alone.

    Args:
        dense: the backbone.
        image: as decoded.
        resize: pixels that its shorter side is resized to; 0: as stored.

    Raises:
        ValueError: if features are not finite.
    """
    pixels = to_tensors(image, np.zeros((1, 1)))[0]
    stored = pixels.shape[1:]
    size = shorter_side_to(pixels, resize or min(stored))
    (patches,) = dense(resize_image(pixels, *size)[None])[-1].patches
    check_finite(patches[None], dense.precision)
    patch, (left, _, top, _) = dense.backbone.patch, padding(*size, dense.backbone.patch)
    scale = np.array([size[1] / stored[1], size[0] / stored[0]]) / patch
    return patches, Grid(scale, np.array([left, top]) / patch)
