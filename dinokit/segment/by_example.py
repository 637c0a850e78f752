"""Masks of what examples show, in new images.

segmenter = ByExample.load(weights="runs/demo", head="runs/head_in_context")
segmenter.set_examples([("a.jpg", mask_of_a)])
ids = segmenter.predict("b.jpg")  # (H, W): 1 where b shows what is marked in a
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from dinokit.data.decode import ImageLike, as_image
from dinokit.data.transforms import size_of
from dinokit.models import Backbone
from dinokit.segment.encoder import Encoder
from dinokit.segment.episodes import as_examples, labels_on_canvas
from dinokit.segment.in_context import Examples, InContextHead
from dinokit.segment.released import SegGpt
from dinokit.segment.saved import load_both

MOST = 64  # numbers in a map of an example, with 0


class Trained:
    """A backbone and a head of kind in_context, in eval mode."""

    def __init__(self, head: InContextHead, encoder: Encoder) -> None:
        self.head, self.encoder, self.channels = head, encoder, encoder.channels

    def remember(self, examples: Sequence[tuple[ImageLike, np.ndarray]], classes: int) -> Examples:
        """Encode images with numbers (H, W) below `classes`."""
        pairs = []
        for image, ids in examples:
            features, _, frame = self.encoder.encode(image)
            pairs.append((features, labels_on_canvas(frame, ids)))
        return as_examples(pairs, classes, self.encoder)

    def answer(self, image: ImageLike, examples: Examples) -> Tensor:
        """The numbers of the examples at each pixel, (H, W)."""
        features, pixels, frame = self.encoder.encode(image)
        return frame.from_canvas(self.head(features, pixels[0], examples)).argmax(dim=0)


class ByExample:
    """A network, a trained head or SegGPT, and the examples, which are encoded once."""

    def __init__(self, network: Trained | SegGpt) -> None:
        self.network: Any = network
        self._examples: Any = None
        self.most = 0  # the largest number in the examples

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return int(self.network.channels)

    @classmethod
    def load(cls, weights: str | Path | Backbone, head: str | Path = "", device: str = "auto") -> Self:
        """Load a backbone and its head, or without `head` a folder with a SegGPT; as Predictor.load()."""
        if not head and not isinstance(weights, Backbone):
            return cls(SegGpt(weights, device))
        module, encoder = load_both(weights, head, device, "in_context")
        return cls(Trained(cast(InContextHead, module), encoder))

    @torch.no_grad()
    def set_examples(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Take images with their masks, in place of earlier ones.

        Args:
            pairs: images as of Predictor.set_image(), each with a mask (H, W) of booleans, or of numbers: 0
                for the rest, and 1, 2, ... for what is to be distinguished.

        Raises:
            OSError, ValueError: if an image cannot be read, a mask has another size, or nothing is marked.
        """
        if not pairs:
            raise ValueError("Give at least one example: an image and its mask.")
        checked = [self._check(image, mask) for image, mask in pairs]
        most = max(int(ids.max()) for _, ids in checked)
        if most < 1:
            raise ValueError("Nothing is marked in the examples: all their masks are empty.")
        self._examples, self.most = self.network.remember(checked, most + 1), most

    @torch.no_grad()
    def predict(self, image: Any) -> np.ndarray:
        """The numbers of the examples at each pixel of an image, (H, W) uint8.

        Raises:
            ValueError: if there are no examples yet, or the image cannot be read.
        """
        if self._examples is None:
            raise ValueError("There are no examples yet: call set_examples() first.")
        found: Tensor = self.network.answer(as_image(image, self.channels), self._examples)
        return found.byte().cpu().numpy()

    def _check(self, image: Any, mask: Any) -> tuple[ImageLike, np.ndarray]:
        """The image of an example, and the numbers of its mask, (H, W) int64."""
        picture = as_image(image, self.channels)
        ids, (width, height) = np.asarray(mask), size_of(picture)
        if ids.shape != (height, width):
            had = " x ".join(str(n) for n in reversed(ids.shape))
            raise ValueError(
                f"The mask of an example has {had} pixels, its image {width} x {height}: they must be of one "
                f"size."
            )
        ids = black_and_white(ids)
        if ids.min() < 0 or ids.max() >= MOST:
            wrong = int(ids.max() if ids.max() >= MOST else ids.min())
            raise ValueError(
                f"A mask has the number {wrong}: numbers are 0 for the rest and 1 to {MOST - 1} for what is "
                f"marked. A picture of black and white is read as 0 and 1."
            )
        return picture, ids


def black_and_white(ids: np.ndarray) -> np.ndarray:
    """Numbers of a mask; a picture whose only numbers are 0 and 255 is 0 and 1."""
    values = set(np.unique(ids).tolist())
    return (ids > 0).astype(np.int64) if values <= {0, 255} else ids.astype(np.int64)
