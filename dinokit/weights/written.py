"""What the writers of other formats share: where the result lies, and what shows that it is the same."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.models.vit import VisionTransformer
from dinokit.weights.found import anatomy

TOLERANCE = (
    1e-4  # of a difference, relative to the largest value: what sums in another order may do in float32
)


@dataclass
class Written:
    """A backbone in another format, opened again by the library that the format is for."""

    command: Callable[[Path], str]  # how a person opens it, once it lies at that path
    forward: Callable[
        [Tensor], tuple[Tensor, Tensor]
    ]  # (b, C, h, w) -> class tokens (b, D), patches (b, N, D)
    sizes: list[int]  # pixels, at which to compare; at the first of them it must say the same
    every_size: bool = False  # it must say the same at all of them
    notes: list[str] = field(default_factory=list)  # what the format cannot say, in sentences


def heads_of(vit: VisionTransformer) -> int:
    """How many attention heads a block has."""
    first: Any = vit.blocks[0]
    return int(first.attn.heads)


def two_sizes(vit: VisionTransformer) -> list[int]:
    """Pixels: that of the stored grid, where no positions are resampled, and another."""
    stored = vit.side * vit.patch
    shown = vit.input.size if vit.input.size % vit.patch == 0 else stored
    return [stored, shown if shown != stored else vit.patch * max(round(0.7 * vit.side), 1)]


def section_of(vit: VisionTransformer) -> dict[str, object]:
    """The recipe's section `backbone` that builds this vit."""
    config, _ = anatomy(vit.state_dict(), heads_of(vit))
    config.pos_offset, config.pos_antialias = vit.offset, vit.antialias
    return {"name": "vit", **asdict(config)}


def metadata_of(vit: VisionTransformer) -> dict[str, str]:
    """What other formats cannot say, as texts in the file's metadata, from which load_backbone takes it."""
    return {"dinokit_backbone": json.dumps(section_of(vit)), "dinokit_input": json.dumps(asdict(vit.input))}


def difference(vit: VisionTransformer, other: Written, size: int) -> tuple[float, float]:
    """The largest difference of class tokens and patches, and the largest value, on two drawn images."""
    images = torch.randn(2, vit.channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = vit([images], [None])[0]
        pairs = list(zip((tokens.cls, tokens.patches), other.forward(images), strict=True))
    return (
        max(float((a - b.reshape(a.shape)).abs().max()) for a, b in pairs),
        max(float(a.abs().max()) for a, _ in pairs),
    )
