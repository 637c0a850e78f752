"""Prompts: points, boxes and masks of M objects in B images, and their encoding (SAM, arXiv 2304.02643).

Two frames. The image as decoded, of H x W pixels, is what users see. The canvas is the square that the
backbone sees: the image scaled so that its long side is S pixels, with the mean colour at the right and
below.

A point is the index of a pixel, (x, y); its place is its centre, (x + 0.5, y + 0.5). A box is (x0, y0, x1,
y1), edges, half open: the box of the pixel (3, 4) is (3, 4, 4, 5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

UP = 4  # cells of a mask's grid per patch, down and across
PADDING, BACKGROUND, FOREGROUND = -1, 0, 1  # signs of points
STROKE_POINTS = 5  # that all strokes of a prompt become, at most

Strokes = Sequence[Any] | np.ndarray  # (H, W) bool; or a line of points (x, y), or several lines


@dataclass(frozen=True)
class Frame:
    """The place of an image of height x width pixels on its canvas."""

    height: int
    width: int
    side: int  # S, of the canvas

    @property
    def scale(self) -> float:
        """Pixels of the canvas per pixel of the image."""
        return self.side / max(self.height, self.width)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image on the canvas."""
        long = max(self.height, self.width)
        height, width = (max(1, round(n * self.side / long)) for n in (self.height, self.width))
        return height, width

    def to_canvas(self, image: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """(C, H, W) floats -> (C, S, S), bilinear with antialiasing; `fill` (C, 1, 1) beyond the image."""
        height, width = self.shape
        canvas = torch.zeros(image.shape[0], self.side, self.side, dtype=image.dtype) + fill
        x = image[None]
        if (height, width) != (self.height, self.width):
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
        canvas[:, :height, :width] = x[0]
        return canvas

    def mask_to_canvas(self, mask: Tensor) -> Tensor:
        """(H, W) bool -> (S, S) bool: pixels of which the object covers half or more.

        A thinner object, which covers half of no pixel, is where it covers half as much as at its densest.
        """
        share = self.to_canvas(mask[None].float())[0]
        most = float(share.max())
        return (share >= (0.5 if most >= 0.5 else most / 2)) & (share > 0)

    def from_canvas(self, logits: Tensor) -> Tensor:
        """Logits (n, g, g) over the canvas -> (n, H, W): resized as logits, so that edges stay smooth."""
        x = logits[None].float()
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        height, width = self.shape
        x = x[:, :, :height, :width]
        return F.interpolate(x, (self.height, self.width), mode="bilinear", align_corners=False)[0]

    def points_to_canvas(self, points: Tensor) -> Tensor:
        """Pixels (n, 2) of the image -> of the canvas."""
        return (points.float() + 0.5) * self._ratio() - 0.5

    def boxes_to_canvas(self, boxes: Tensor) -> Tensor:
        """Edges (n, 4) in the image -> on the canvas."""
        return boxes.float() * self._ratio().repeat(2)

    def _ratio(self) -> Tensor:
        height, width = self.shape  # rounded: x and y may differ by a fraction of a pixel
        return torch.tensor([width / self.width, height / self.height])


@dataclass
class Prompt:
    """What is asked for M objects, on the canvas; the tensors are on one device."""

    image: Tensor  # (M,) int64: the image of each, of the batch
    points: Tensor  # (M, n, 2) pixels; n may be 0
    signs: Tensor  # (M, n) int64: FOREGROUND, BACKGROUND or PADDING
    boxes: Tensor  # (M, 4) edges; NaN where there is none
    masks: Tensor | None = (
        None  # (M, 1, 4 h, 4 w) logits of the answer before; None, or NaN: there is none yet
    )
    # What only a unified head reads (dinokit.segment.unified); None: no prompt has it.
    strokes: Tensor | None = None  # (M, h, w) the share of each patch under strokes; 0 everywhere: none
    region: Tensor | None = None  # (M, m + 1, c) patches of another image; NaN where there is none
    words: Tensor | None = None  # (M, V) 1 at the words of a text; 0 everywhere: none

    def with_points(self, points: Tensor, signs: Tensor) -> "Prompt":
        """The prompt with one more point for each object: (M, 2), (M,)."""
        return replace(
            self,
            points=torch.cat([self.points, points[:, None].to(self.points)], dim=1),
            signs=torch.cat([self.signs, signs[:, None].to(self.signs)], dim=1),
        )

    def rows(self, chosen: slice) -> "Prompt":
        """Some of the prompts."""
        parts: dict[str, Any] = {}
        for item in fields(self):
            x = getattr(self, item.name)
            parts[item.name] = None if x is None else x[chosen]
        return Prompt(**parts)


def empty_prompt(image: Tensor) -> Prompt:
    """A prompt without points and boxes for each entry of `image` (M,)."""
    m, device = len(image), image.device
    return Prompt(
        image,
        torch.zeros(m, 0, 2, device=device),
        torch.zeros(m, 0, dtype=torch.int64, device=device),
        torch.full((m, 4), math.nan, device=device),
    )


def boxes_of(masks: Tensor) -> Tensor:
    """The tight boxes (M, 4) of masks (M, H, W) bool, none of them empty: edges, half open."""
    columns, rows = masks.any(dim=1).int(), masks.any(dim=2).int()
    x0, y0 = columns.argmax(dim=1), rows.argmax(dim=1)
    x1 = masks.shape[2] - columns.flip(1).argmax(dim=1)
    y1 = masks.shape[1] - rows.flip(1).argmax(dim=1)
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def mask_logits(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks on the canvas (M, S, S) bool -> logits (M, 1, 4 h, 4 w), as large as those of a sure answer."""
    return 16 * F.interpolate(masks[:, None].float(), grid, mode="area") - 8


def check_points(points: Sequence[Sequence[float]], size: tuple[int, int]) -> None:
    """Refuse what is no point, or is outside an image of `size` (height, width).

    Raises:
        ValueError: it names the first one, and the size.
    """
    height, width = size
    for point in points:
        if len(point) != 2:
            raise ValueError(f"points: {list(point)} is none; each point is two numbers, x and y.")
        x, y = point
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"The point ({x:g}, {y:g}) is outside the image, which is {width} pixels wide and {height} "
                f"high: x goes from 0 to {width - 1}, y from 0 to {height - 1}."
            )


def check_box(box: Sequence[float], size: tuple[int, int]) -> None:
    """Refuse a box that is none, or that leaves an image of `size` (height, width).

    Raises:
        ValueError: it says what a box is.
    """
    height, width = size
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(
            f"box={list(box)}: it is four numbers x0, y0, x1, y1, the left and upper edge before the others."
        )
    if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
        raise ValueError(f"box={list(box)} leaves the image, which is {width} pixels wide and {height} high.")


def stroke_mask(strokes: Strokes, size: tuple[int, int]) -> np.ndarray:
    """The pixels of strokes, (H, W) bool; lines are one pixel wide.

    Args:
        strokes: a mask, a line, or several lines.
        size: height and width of the image.

    Raises:
        ValueError: if a mask has another size or marks nothing, or a point is none or outside the image.
    """
    height, width = size
    if isinstance(strokes, np.ndarray) and strokes.dtype == bool:
        if strokes.shape != size:
            had = " x ".join(str(n) for n in reversed(strokes.shape))
            raise ValueError(
                f"The mask of strokes has {had} pixels, the image {width} x {height}: they must be of one "
                f"size."
            )
        if not strokes.any():
            raise ValueError("strokes: the mask marks no pixel.")
        return strokes
    if isinstance(strokes, np.ndarray) and strokes.ndim == 2 and strokes.shape[1] != 2:
        raise ValueError(
            f"strokes: this array has the shape {strokes.shape} and type {strokes.dtype}. A mask is of "
            f"booleans, such as mask > 0; a line is (n, 2)."
        )
    canvas = Image.new("1", (width, height))
    for line in _lines(strokes):
        check_points(line, size)
        pixels = [(min(round(x), width - 1), min(round(y), height - 1)) for x, y in line]
        ImageDraw.Draw(canvas).line(pixels, fill=1)
        canvas.putpixel(pixels[-1], 1)  # of one point no line is drawn
    return np.asarray(canvas)


def _lines(strokes: Strokes) -> list[list[list[float]]]:
    """The lines as lists of points; a line alone is one of them.

    Raises:
        ValueError: if there is none, or one has no point.
    """
    try:
        single = len(strokes) > 0 and isinstance(strokes[0][0], int | float | np.number)
        lines = [[[float(n) for n in point] for point in line] for line in ([strokes] if single else strokes)]
    except (TypeError, ValueError, IndexError, KeyError):
        lines = []
    if not lines or not all(lines):
        raise ValueError(
            "strokes: give a mask of booleans of the image's size, a line [[x,y],[x,y],...], or several "
            "lines."
        )
    return lines


def stroke_points(mask: np.ndarray, most: int = STROKE_POINTS) -> np.ndarray:
    """Pixels of strokes that lie far from each other: (n, 2) x and y, n at most `most`.

    The first is the pixel nearest to the mean of all, each further one the pixel farthest from those so far;
    of equal ones the first, row by row.

    Args:
        mask: (H, W) bool, not empty.
        most: n, at most.
    """
    pixels = np.argwhere(mask)[:, ::-1].astype(float)
    chosen = [int(np.linalg.norm(pixels - pixels.mean(axis=0), axis=1).argmin())]
    away = np.linalg.norm(pixels - pixels[chosen[0]], axis=1)
    while len(chosen) < most and away.max() > 0:
        chosen.append(int(away.argmax()))
        away = np.minimum(away, np.linalg.norm(pixels - pixels[chosen[-1]], axis=1))
    return pixels[chosen]


def channel_norm(width: int) -> LayerNorm2d:
    """Layer norm over the channels of a map (b, c, h, w)."""
    return LayerNorm2d(width, eps=1e-6)


def pixel_stem(channels: int, width: int) -> nn.Sequential:
    """Pixels (b, C, S, S) -> a map (b, width, S / 2, S / 2), for outlines that patches have lost."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1), channel_norm(16), nn.GELU(),
        nn.Conv2d(16, width, 3, padding=1),
    )  # fmt: skip


class PromptEncoder(nn.Module):
    """Prompts as tokens and as maps.

    A place u in [0, 1]^2 becomes sines and cosines of random directions of 2 u - 1, which are part of the
    weights. A point adds a learnt vector of its sign, a corner of a box one of its own. A prompt without a
    box has one token that stands for no box, as the published network has beside points.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.directions: Tensor
        self.register_buffer("directions", torch.randn(2, width // 2))
        self.signs = nn.Parameter(torch.randn(2, width))  # background, foreground
        self.corners = nn.Parameter(torch.randn(2, width))
        self.no_box, self.no_mask = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        small, middle = 4, 16  # channels, as published
        self.mask = nn.Sequential(
            nn.Conv2d(1, small, 2, stride=2), channel_norm(small), nn.GELU(),
            nn.Conv2d(small, middle, 2, stride=2), channel_norm(middle), nn.GELU(),
            nn.Conv2d(middle, width, 1),
        )  # fmt: skip

    def places(self, u: Tensor) -> Tensor:
        """(..., 2) in [0, 1] -> (..., c)."""
        x = 2 * math.pi * (2 * u - 1) @ self.directions
        return torch.cat([x.sin(), x.cos()], dim=-1)

    def grid(self, h: int, w: int) -> Tensor:
        """Positions of the cells, row by row: (h * w, c)."""
        y, x = (
            (torch.arange(n, device=self.directions.device, dtype=torch.float32) + 0.5) / n for n in (h, w)
        )
        return self.places(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)).flatten(0, 1)

    def forward(self, prompt: Prompt, side: int) -> tuple[Tensor, Tensor]:
        """Tokens (M, n + 2, c) and which of them are no padding (M, n + 2)."""
        points = self.places((prompt.points + 0.5) / side)
        points = points + self.signs[prompt.signs.clamp(min=0)]
        boxed = ~prompt.boxes.isnan().any(dim=1)
        corners = self.places(prompt.boxes.nan_to_num().unflatten(1, (2, 2)) / side) + self.corners
        corners = torch.where(boxed[:, None, None], corners, self.no_box)
        used = torch.stack([torch.ones_like(boxed), boxed], dim=1)
        return torch.cat([points, corners], dim=1), torch.cat([prompt.signs != PADDING, used], dim=1)

    def dense(self, masks: Tensor | None) -> Tensor:
        """Logits (M, 1, 4 h, 4 w), NaN for prompts without -> (M, c, h, w); None -> (1, c, 1, 1)."""
        none = self.no_mask[None, :, None, None]
        if masks is None:
            return none
        return torch.where(
            masks.isnan().flatten(1).any(dim=1)[:, None, None, None], none, self.mask(masks.nan_to_num())
        )
