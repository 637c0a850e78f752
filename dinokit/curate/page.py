"""Pieces of a page of HTML that needs no other file, and contact sheets: what reports are made of."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from dinokit.curate.sets import ImageSet
from dinokit.data.sources import ImageLike

SIDE = 112  # pixels of a picture
BARS = 200  # bars of a diagram at most
_STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222}
h1 {font-size: 1.5em} h2 {font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc}
table {border-collapse: collapse} td, th {padding: .2em .9em .2em 0; text-align: left; vertical-align: top}
.n {text-align: right; font-variant-numeric: tabular-nums}
.row {display: flex; flex-wrap: wrap; gap: 6px; align-items: flex-start; margin: 8px 0}
.row > b {width: 110px; flex: none; font-weight: normal; color: #666}
.row figure {margin: 0; width: 112px; font-size: 11px; color: #666}
.row span {display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.row img, .none {width: 112px; height: 112px; object-fit: contain; background: #eee; display: block}
.row .none {height: 8px}
.row .asks img {outline: 2px solid #4a7ab5; outline-offset: -2px} .row .asks span {color: #4a7ab5}
svg {width: 100%; height: 90px; background: #f6f6f6}
"""
Tile = tuple[ImageSet, int, str]  # a set, an image of it, what to write below


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page."""
    fits = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head = f"{fits}<title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'>{head}<h1>{escape(title)}</h1>{''.join(sections)}</html>\n"


def section(title: str, content: str) -> str:
    """A headline and what stands below it."""
    return f"<h2>{escape(title)}</h2>{content}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers stand to the right, with thousands apart."""
    numbers = [any(_is_number(cells[place]) for cells in rows) for place in range(len(head))]
    first = "".join(
        f"<th{' class=n' * number}>{escape(word)}" for word, number in zip(head, numbers, strict=True)
    )
    rest = "".join(f"<tr>{''.join(map(_cell, cells))}" for cells in rows)
    return f"<table><tr>{first}{rest}</table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _cell(value: Any) -> str:
    return f"<td class=n>{value:,}" if _is_number(value) else f"<td>{escape(str(value))}"


def bars(sizes: np.ndarray) -> str:
    """A diagram of sizes, largest first; if there are many, each bar is the mean of several."""
    ordered = np.sort(sizes)[::-1].astype(np.float64)
    means = np.array([part.mean() for part in np.array_split(ordered, min(BARS, len(ordered)))])
    high = max(float(means.max(initial=0)), 1e-9)
    step = 1000 / len(means)
    shapes = "".join(
        f"<rect x='{i * step:.2f}' y='{90 - 88 * v / high:.2f}' width='{step * 0.9:.2f}' "
        f"height='{88 * v / high:.2f}' fill='#4a7ab5'/>"
        for i, v in enumerate(means)
    )
    return f"<svg viewBox='0 0 1000 90' preserveAspectRatio='none'>{shapes}</svg>"


def figure(content: str, caption: str) -> str:
    """Something with a line above it."""
    return f"<p>{escape(caption)}</p>{content}"


def row(title: str, tiles: Sequence[Tile], asks: bool = False) -> str:
    """Pictures side by side; where one cannot be read, its name alone. The first is framed if it `asks`."""
    shown = "".join(_tile(*tile, asks and not place) for place, tile in enumerate(tiles))
    return f"<div class=row><b>{escape(title)}</b>{shown}</div>"


def _tile(one: ImageSet, number: int, caption: str, asks: bool) -> str:
    name = one.name(number)
    try:
        with BytesIO() as file:
            small(one.picture(number), SIDE).save(file, "JPEG", quality=75)
            shown = f"<img alt='' src='data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}'>"
    except (OSError, ValueError):
        shown = "<div class=none></div>"
    words = "".join(f"<span>{escape(text)}</span>" for text in (caption, PurePath(name).name))
    return f"<figure{' class=asks' * asks} title='{escape(name, quote=True)}'>{shown}{words}</figure>"


def small(picture: ImageLike, side: int) -> Image.Image:
    """In RGB, no side longer than `side`; of more than three channels the first, of 16 bits the upper 8."""
    if not isinstance(picture, Image.Image):
        array = picture[..., :3] if picture.shape[2] >= 3 else picture[..., :1].repeat(3, axis=2)
        top = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
        picture = Image.fromarray((array.astype(np.float32) * (255 / top)).astype(np.uint8))
    return ImageOps.contain(picture.convert("RGB"), (side, side))


def contact_sheet(
    pictures: Sequence[tuple[ImageLike | None, str]], side: int = 192, across: int = 6
) -> Image.Image:
    """Pictures with a line of text below each; a grey square where there is none."""
    text = 16
    high = -(-len(pictures) // across) * (side + text)
    sheet = Image.new("RGB", (min(across, len(pictures)) * side, high), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(pictures):
        x, y = place % across * side, place // across * (side + text)
        tile = Image.new("RGB", (side, side), "#dddddd") if picture is None else small(picture, side - 4)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        while draw.textlength(caption) > side - 8:
            caption = f"{caption.removesuffix('...')[:-1]}..."
        draw.text((x + 4, y + side), caption, fill="black")
    return sheet
