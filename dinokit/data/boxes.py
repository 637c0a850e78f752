"""Boxes in images, and in texts: "[0.12, 0.30, 0.45, 0.71]", as LLaVA-1.5 writes them (arXiv 2310.03744).

The four numbers are the left, upper, right and lower edge. In a text they are parts of the sides of the image
from its upper left corner, with two decimals.
"""

import re
from collections.abc import Callable

Box = tuple[float, float, float, float]  # edges: left, top, right, bottom

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"  # 1e-05 too, as Python writes a small one
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of positive area."""
    across, down = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(across, 0.0) * max(down, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def box_text(box: Box) -> str:
    """A box as it is written; its edges are parts of the image's sides."""
    return f"[{', '.join(f'{edge:.2f}' for edge in box)}]"


def boxes_in(text: str) -> list[Box]:
    """All boxes of a text, in any unit, with edges in any order."""
    return [_edges(found) for found in _BOX.finditer(text)]


def box_in(text: str) -> Box | None:
    """The first box of a text; None if there is none, or it has no area."""
    box = next(iter(boxes_in(text)), None)
    return box if box and box[0] < box[2] and box[1] < box[3] else None


def with_boxes(text: str, change: Callable[[Box], Box | None]) -> str:
    """The text with each box in it changed and written anew; those that become None stay as they are."""

    def write(found: re.Match[str]) -> str:
        changed = change(_edges(found))
        return found.group() if changed is None else box_text(changed)

    return _BOX.sub(write, text)


def _edges(found: re.Match[str]) -> Box:
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom
