"""Images on a canvas and their features: what every head of this package sees of an image.

The canvas is stored in 8 bits, and features in 16: so they are the same whether they are kept or computed
again, and a run that resumes sees what an uninterrupted one sees.

    C  channels     S  side of the canvas     D  width of the features     h, w  patches down and across
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dinokit.data.decode import ImageLike
from dinokit.data.objects import Objects, ObjectSource
from dinokit.data.transforms import size_of, to_tensor, to_uint8
from dinokit.features import dense, device_of, frozen, last_blocks
from dinokit.features.tokens import normalised
from dinokit.models import Backbone
from dinokit.segment.prompts import Frame


def to_canvas(image: ImageLike, side: int, fill: Tensor) -> tuple[Tensor, Frame]:
    """An image on a canvas, (C, S, S) uint8, beside the colour `fill` (C, 1, 1), and its place there."""
    width, height = size_of(image)
    frame, pixels = Frame(height, width, side), to_tensor(image)[0]
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return to_uint8(frame.to_canvas(pixels, fill)), frame


class Encoder:
    """A frozen backbone that sees canvases.

    Args:
        backbone: in eval mode.
        side: S; 0: the size that the backbone was trained on.
        layers: last blocks whose patches are concatenated.

    Raises:
        ValueError: if S is no multiple of the patch, or there are not so many blocks.
    """

    def __init__(self, backbone: Backbone, side: int = 0, layers: int = 1) -> None:
        self.backbone, self.channels = backbone, backbone.channels
        self.side = side or backbone.input.size
        self.device, self.blocks = device_of(backbone), last_blocks(backbone, layers)
        if self.side % backbone.patch:
            near = max(1, round(self.side / backbone.patch)) * backbone.patch
            raise ValueError(
                f"size={self.side} is no multiple of the backbone's patch of {backbone.patch} pixels: take "
                f"size={near}."
            )
        self.width = self.features(
            torch.zeros(backbone.channels, self.side, self.side, dtype=torch.uint8)
        ).shape[0]

    def canvas(self, image: ImageLike) -> tuple[Tensor, Frame]:
        """The image on its canvas, (C, S, S) uint8, and its place there."""
        return to_canvas(image, self.side, torch.tensor(self.backbone.input.mean).view(-1, 1, 1))

    @torch.no_grad()
    def encode(self, image: ImageLike) -> tuple[Tensor, Tensor, Frame]:
        """One image: features (D, h, w), pixels (1, C, S, S) normalised for the backbone, and its place."""
        canvas, frame = self.canvas(image)
        with frozen(self.backbone):
            return self.features(canvas).float(), self.pixels(canvas[None]), frame

    def features(self, canvas: Tensor) -> Tensor:
        """A canvas (C, S, S) uint8 -> (D, h, w) float16, alone: a batch would change the last bits."""
        # On a GPU the backbone runs in bf16; features are rounded more than that makes a difference.
        precision = torch.bfloat16 if self.device.type == "cuda" else None
        maps = dense(self.backbone, canvas[None].to(self.device), self.blocks, precision=precision)
        return torch.cat([m.patches for m in maps], dim=1)[0].half()

    def pixels(self, canvases: Tensor) -> Tensor:
        """Canvases (B, C, S, S) uint8, normalised as for the backbone."""
        return normalised(self.backbone, canvases.to(self.device))


@dataclass
class Item:
    """An image as heads see it, with its objects."""

    canvas: Tensor  # (C, S, S) uint8
    frame: Frame
    objects: Objects
    encoder: Encoder

    @cached_property
    def features(self) -> Tensor:
        """(D, h, w) float16, computed when needed: of many images only the classes are looked at."""
        return self.encoder.features(self.canvas)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, those of the features included."""
        patches = (self.encoder.side // self.encoder.backbone.patch) ** 2
        runs = sum(rle.counts.nbytes for rle in self.objects.rles)
        return self.canvas.nbytes + 2 * self.encoder.width * patches + runs

    def mask(self, number: int) -> Tensor:
        """One object on the canvas, (S, S) bool."""
        return self.frame.mask_to_canvas(torch.from_numpy(np.ascontiguousarray(self.objects.mask(number))))


class Items:
    """The images of a source, with features; the last ones used are kept, up to `gib`."""

    def __init__(self, source: ObjectSource, encoder: Encoder, gib: float) -> None:
        self.source, self.encoder = source, encoder
        self._room, self._kept = gib * 2**30, OrderedDict[int, Item]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        image, objects = self.source[index]
        if not isinstance(objects, Objects):  # of a source of another package
            raise ValueError(
                f"{self.source.name(index)} comes with a {type(objects).__name__}, not with Objects: "
                f"dinokit.data.objects.objects_of_ids(map) makes them from a map of numbers, one an object."
            )
        canvas, frame = self.encoder.canvas(image)
        item = Item(canvas, frame, objects, self.encoder)
        self._kept[index] = item
        self._room -= item.nbytes
        while self._room < 0 and self._kept:
            self._room += self._kept.popitem(last=False)[1].nbytes
        return item
