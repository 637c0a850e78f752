"""Compares the features of a backbone with those of its export to another format."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.models.vit import VisionTransformer
from dinokit.weights.architecture import infer_config

TOLERANCE = 1e-4  # of a difference, relative to the largest value: another order of float32 sums


@dataclass
class Exported:
    """A backbone in another format, opened again by the library of that format."""

    command: Callable[[Path], str]  # code that opens the file at a path
    # (b, C, h, w) -> class tokens (b, D), patches (b, N, D)
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    sizes: list[int]  # pixels, at which features are compared; at the first they must be equal
    every_size: bool = False  # they must be equal at all of them
    notes: list[str] = field(default_factory=list)  # sentences: what the format has no place for


def heads_of(vit: VisionTransformer) -> int:
    """The number of attention heads of a block."""
    first: Any = vit.blocks[0]
    return int(first.attn.heads)


def two_sizes(vit: VisionTransformer) -> list[int]:
    """Pixels: the size of the stored grid, where positions are not resampled, and another."""
    stored = vit.side * vit.patch
    shown = vit.input.size if vit.input.size % vit.patch == 0 else stored
    return [stored, shown if shown != stored else vit.patch * max(round(0.7 * vit.side), 1)]


def section_of(vit: VisionTransformer) -> dict[str, object]:
    """The section `backbone` of a recipe that builds this vit."""
    config, _ = infer_config(vit.state_dict(), heads_of(vit))
    config.pos_offset, config.pos_antialias = vit.offset, vit.antialias
    return {"name": "vit", **asdict(config)}


def metadata_of(vit: VisionTransformer) -> dict[str, str]:
    """Metadata for values that other formats have no place for; load_backbone reads it."""
    return {"dinokit_backbone": json.dumps(section_of(vit)), "dinokit_input": json.dumps(asdict(vit.input))}


def difference(vit: VisionTransformer, other: Exported, size: int) -> tuple[float, float]:
    """The largest difference of class tokens and patches, and the largest value, on two random images."""
    images = torch.randn(2, vit.channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = vit([images], [None])[0]
        pairs = list(zip((tokens.cls, tokens.patches), other.forward(images), strict=True))
    return (
        max(float((a - b.reshape(a.shape)).abs().max()) for a, b in pairs),
        max(float(a.abs().max()) for a, _ in pairs),
    )
