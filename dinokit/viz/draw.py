"""Puts pictures together: sheets of tiles, figures with titles, charts, colours of numbers, frames.

h, w  of a picture     b  pictures     C  channels
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Picture = NDArray[np.uint8]  # (H, W, 3)

GAP = 2  # white pixels between tiles
FRAME = 3  # pixels of the frame that says whether a neighbour has the class of its query
SAME, OTHER = (40, 160, 60), (210, 50, 40)  # colours of that frame
DPI = 100
HEAT = "inferno"
LINES = "#3b82c4", "#d97706", "#2e9e5b", "#c0504d", "#8b5cf6", "#0d9488"  # read well on white and on black
INK = "#010203"  # of axes and labels; becomes currentColor


def grid(rows: Sequence[Sequence[Picture]]) -> Picture:
    """Rows of pictures on white, as large as the first (h, w, 3); shorter rows end in white.

    A picture of another size is scaled to fit, with its shape kept, into the middle of its place.
    """
    height, width, _ = rows[0][0].shape
    across = max(len(row) for row in rows)
    shape = len(rows) * (height + GAP) + GAP, across * (width + GAP) + GAP, 3
    sheet = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            scale = min(height / picture.shape[0], width / picture.shape[1])
            h, w = (max(round(side * scale), 1) for side in picture.shape[:2])
            top, left = top + (height - h) // 2, left + (width - w) // 2
            if (h, w) != picture.shape[:2]:
                picture = np.asarray(Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST))
            sheet[top : top + h, left : left + w] = picture
    return sheet


def figure(panels: Mapping[str, Picture], path: Path) -> None:
    """Write pictures, one below the other, each under its title, to a PNG."""
    title = 24  # pixels
    widest = max(picture.shape[1] for picture in panels.values())
    heights = [picture.shape[0] * widest / picture.shape[1] for picture in panels.values()]
    total = sum(heights) + (title + GAP) * len(panels)
    drawing = Figure(figsize=(widest / DPI, total / DPI), dpi=DPI)
    top = total
    for (text, picture), height in zip(panels.items(), heights, strict=True):
        top -= title + height
        axes = drawing.add_axes((0, top / total, 1, height / total))
        axes.imshow(picture, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(text, loc="left", fontsize=10, pad=4)
        top -= GAP
    drawing.savefig(path)


@dataclass
class Line:
    """A curve of a chart."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = LINES[0]
    dashed: bool = False


def line_chart(
    lines: Sequence[Line], marks: Sequence[float] = (), size: tuple[float, float] = (3.4, 1.9)
) -> str:
    """Curves as an <svg> element: text and axes in the colour of the page, which may be light or dark.

    Args:
        lines: at least one.
        marks: places of vertical dotted lines.
        size: width and height in inches of 72 pixels.
    """
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "dinokit", "text.parse_math": False}
    settings |= {"font.size": 8, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}
    with rc_context(settings):
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.add_subplot()
        for place in marks:
            axes.axvline(place, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
        for line in lines:
            marker, style = "." if len(line.x) < 20 else "", "--" if line.dashed else "-"
            y = [float(f"{value:.6g}") for value in line.y]  # a constant is one in float32 too
            axes.plot(
                line.x, y, color=line.colour, linestyle=style, linewidth=1.4, marker=marker, markersize=4
            )
        axes.tick_params(colors=INK, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.ticklabel_format(axis="y", useOffset=False)
        file = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(
        r"<defs>\s*<style.*?</defs>", "", svg[svg.index("<svg") :], flags=re.S
    )  # it has a rule for *
    return re.sub(r' id="[a-z_.]+\d+"(?=>)', "", svg).replace(INK, "currentColor")


def heat(values: Tensor) -> Picture:
    """Numbers (h, w) in [0, 1] as colours from black to yellow."""
    colours = colormaps[HEAT](values.clamp(0, 1).cpu().numpy())[..., :3]
    return np.ascontiguousarray((colours * 255).round().astype(np.uint8))


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """A colour for each of `count` classes; of more than 20 some are hard to tell apart."""
    if count <= 20:
        table = np.array(colormaps["tab20"].colors)  # type: ignore[attr-defined]
        colours = np.concatenate([table[::2], table[1::2]])[:count]  # ten dark ones, then the same ten light
    else:
        colours = colormaps["hsv"](np.arange(count) / count)[:, :3]
    return [(r, g, b) for r, g, b in (colours * 255).round().astype(int).tolist()]


def enlarge(picture: Picture, height: int, width: int) -> Picture:
    """A picture with every pixel repeated, to another size."""
    h, w, _ = picture.shape
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return np.ascontiguousarray(picture[rows][:, columns])


def boxed(picture: Picture, side: int) -> Picture:
    """A picture on a white square, its longer side resized to `side`."""
    image = ImageOps.contain(Image.fromarray(picture), (side, side), Image.Resampling.NEAREST)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)


def marked(picture: Picture, point: tuple[float, float]) -> Picture:
    """A copy of a picture with a cross at `point`: across and down, as shares of 1."""
    height, width, _ = picture.shape
    x, y = min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)
    arm, copy = max(min(height, width) // 12, 2), picture.copy()
    copy[max(y - arm, 0) : y + arm + 1, x] = OTHER
    copy[y, max(x - arm, 0) : x + arm + 1] = OTHER
    return copy


def to_picture(image: Tensor) -> Picture:
    """An image (C, H, W), uint8 or in [0, 1], as (H, W, 3)."""
    x = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return to_pictures(x[None])[0]


def to_pictures(x: Tensor) -> Picture:
    """Images (b, C, h, w) in [0, 1] as (b, h, w, 3): one channel is grey, of many three are shown."""
    x = x.repeat(1, 3, 1, 1) if x.shape[1] < 3 else x[:, :3]
    pixels = (x.clamp(0, 1) * 255).round().byte().movedim(1, 3)
    return np.ascontiguousarray(pixels.cpu().numpy())


def framed(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    """A picture with a frame inside its edges."""
    result = np.empty_like(picture)
    result[:] = colour
    result[FRAME:-FRAME, FRAME:-FRAME] = picture[FRAME:-FRAME, FRAME:-FRAME]
    return result
