"""What to extract, held against the backbone that it is asked of.

g  images of one shape     L  blocks asked for     D  width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dinokit.data.transforms import FitTransform
from dinokit.features.layout import TOKENS
from dinokit.features.tokens import device_of, frozen
from dinokit.models import Backbone, Tokens


@dataclass(frozen=True)
class ExtractSpec:
    """What to compute.

    Attributes:
        tokens: of cls, mean (of the patches), patch, registers.
        layers: 'last', 'lastN', or the numbers of blocks, from 0.
        fit: how an image is shown: crop, pad or resize (dinokit.data.transforms.FitTransform).
        size: pixels; 0: for crop what the backbone was trained on, else as the image is.
        resize: pixels of the shorter side before a crop; 0: 256 / 224 of `size`.
        dtype: of the numbers on disk.
        files: npy or parquet.
        shard: images in a shard; 0: 4,096, or fewer if they would make more than 256 MiB.
    """

    tokens: tuple[str, ...] = ("cls",)
    layers: str | Sequence[int] = "last"
    fit: Literal["crop", "pad", "resize"] = "crop"
    size: int = 0
    resize: int = 0
    dtype: Literal["float16", "float32"] = "float16"
    files: Literal["npy", "parquet"] = "npy"
    shard: int = 0

    def differ(self, token: str) -> bool:
        """Whether images have different numbers of this token."""
        return token == "patch" and self.fit != "crop"


def blocks_of(layers: str | Sequence[int], backbone: Backbone) -> list[int]:
    """The numbers of the blocks that 'last', 'lastN', or a list of numbers means, in the order of depth.

    Raises:
        ValueError: if there are no such blocks, or the backbone shows its last alone.
    """
    depth = len(backbone.blocks)
    if isinstance(layers, str):
        count = layers.removeprefix("last") or "1"
        if not layers.startswith("last") or not count.isdecimal() or int(count) < 1:
            raise ValueError(f"layers={layers}: it is last, last4 (or another number), or a list as [2,5].")
        blocks = list(range(depth - int(count), depth)) if count != "1" else [max(depth - 1, 0)]
    else:
        blocks = sorted(set(layers))
    if blocks and not 0 <= blocks[0] <= blocks[-1] <= max(depth - 1, 0):
        raise ValueError(f"layers={layers}: the backbone has {depth} blocks, numbered from 0.")
    if not blocks or (blocks != [max(depth - 1, 0)] and not hasattr(backbone, "layers")):
        raise ValueError(f"layers={layers}: {type(backbone).__name__} shows its last block alone.")
    return blocks


def fit_of(wanted: ExtractSpec, backbone: Backbone) -> FitTransform:
    """How images are shown.

    Raises:
        ValueError: for sizes that do not fit the patch, or tokens that there are not.
    """
    unknown = [token for token in wanted.tokens if token not in TOKENS]
    if unknown or not wanted.tokens:
        raise ValueError(f"tokens={','.join(wanted.tokens)}: there is {', '.join(TOKENS)}.")
    size = wanted.size or (backbone.input.size if wanted.fit == "crop" else 0)
    fit = FitTransform(wanted.fit, size, wanted.resize or round(size * 256 / 224), backbone.patch)
    if fit.how == "crop" and (fit.size < 1 or fit.size % fit.patch):
        near = max(round(fit.size / fit.patch), 1) * fit.patch
        raise ValueError(
            f"size={fit.size} is no multiple of the backbone's patch, {fit.patch} pixels; the nearest is "
            f"{near}. fit=pad and fit=resize take any size."
        )
    if fit.how == "crop" and fit.resize < fit.size:
        raise ValueError(f"resize={fit.resize} leaves no crop of size={fit.size}: it must be as large.")
    return fit


def layers_of(backbone: Backbone, crops: list[Tensor], blocks: list[int]) -> list[list[Tokens]]:
    """For each group of crops (g, C, h, w), the tokens after each of the blocks."""
    if not crops:
        return []
    if blocks == [max(len(backbone.blocks) - 1, 0)]:
        return [[tokens] for tokens in backbone(crops, [None] * len(crops))]
    return [backbone.layers(x, blocks) for x in crops]  # type: ignore[attr-defined]


def row_of(token: str, layers: list[Tokens]) -> Tensor:
    """(g, ..., [L,] D) of one token from the layers' Tokens."""
    if token == "mean":
        each = [tokens.patches.float().mean(dim=1) for tokens in layers]
    else:
        name = "patches" if token == "patch" else token
        each = [getattr(tokens, name) for tokens in layers]
    return each[0] if len(each) == 1 else torch.stack(each, dim=-2)


def rows_of(
    wanted: ExtractSpec, backbone: Backbone, blocks: list[int], fit: FitTransform
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of an image's row of each token; of a patch's row, if grids differ.

    Raises:
        ValueError: if it has no such tokens.
    """
    side = fit.size if fit.how == "crop" else fit.patch
    blank = torch.zeros(1, backbone.channels, side, side, device=device_of(backbone))
    with frozen(backbone), torch.inference_mode():
        tokens = layers_of(backbone, [blank], blocks)[0]
    done = {}
    for token in wanted.tokens:
        row = tuple(row_of(token, tokens).shape[1:])
        if 0 in row or (token == "mean" and not tokens[0].patches.shape[1]):
            raise ValueError(f"tokens={token}: this backbone has none.")
        done[token] = (row[1:] if wanted.differ(token) else row, np.dtype(wanted.dtype))
    return done
