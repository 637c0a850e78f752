"""Strokes as prompts: drawn into a mask, and as points for a head that has no strokes of its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dinokit.segment.prompts import check_points

MOST = 5  # points that all strokes of a prompt become

Strokes = Sequence[Any] | np.ndarray  # (H, W) bool; or a line of points (x, y), or several lines


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


def stroke_points(mask: np.ndarray, most: int = MOST) -> np.ndarray:
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


def random_stroke(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random walk inside a mask (H, W) bool, as people scribble: 3 to 30 pixels long, 1 to 3 wide.

    Where it would leave the mask it turns; it is shorter where it cannot. An empty mask has an empty stroke.
    """
    stroke, pixels = np.zeros_like(mask), np.argwhere(mask)
    if not len(pixels):
        return stroke
    y, x = pixels[rng.integers(len(pixels))].astype(float)
    angle, width = rng.uniform(0, 2 * np.pi), int(rng.integers(1, 4))
    for _ in range(int(rng.integers(3, 31))):
        top, left = max(0, round(y) - (width - 1) // 2), max(0, round(x) - (width - 1) // 2)
        stroke[top : round(y) + width // 2 + 1, left : round(x) + width // 2 + 1] = True
        for turn in rng.normal(0, (0.4, 1.0, 2.0, 3.0)):
            down, right = y + np.sin(angle + turn), x + np.cos(angle + turn)
            inside = 0 <= round(down) < mask.shape[0] and 0 <= round(right) < mask.shape[1]
            if inside and mask[round(down), round(right)]:
                y, x, angle = down, right, angle + turn
                break
    return stroke & mask
