"""Maps of patch features, of images of any size.

An image is padded evenly on all sides (an odd pixel goes to the right and below) to multiples of the patch
with zeros, which is the mean colour.

    b  images     C  channels     D  width of the backbone     h, w  patches down and across
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.features.frozen import device_of, frozen, normalised
from dinokit.models import Backbone, Tokens

# Blocks that depth heads look into: those of the released heads, by the backbone's depth.
SPREAD = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}


@dataclass
class Map:
    """What a backbone says, after one of its blocks, of a batch of images."""

    patches: Tensor  # (b, D, h, w) float32
    cls: Tensor  # (b, D) float32

    def with_cls(self) -> Tensor:
        """(b, 2 D, h, w): the patches, and beside each the class token."""
        return torch.cat([self.patches, self.cls[:, :, None, None].expand_as(self.patches)], dim=1)


def last_blocks(backbone: Backbone, count: int) -> list[int]:
    """The numbers of the last `count` blocks; of a backbone without blocks, [-1]: what it gives.

    Raises:
        ValueError: if there are not so many.
    """
    depth = len(backbone.blocks)
    if count == 1:
        return [depth - 1]
    if count > depth:
        raise ValueError(
            f"{count} blocks were asked for, but {type(backbone).__name__} has {depth or 'none to look into'}"
            f": ask for one."
        )
    return list(range(depth - count, depth))


def spread_blocks(backbone: Backbone, count: int) -> list[int]:
    """The numbers of `count` blocks at equal distances, the last among them.

    For four blocks of a backbone 12, 24 or 40 deep, they are those of DINOv2's depth heads.

    Raises:
        ValueError: if there are not so many.
    """
    depth = len(backbone.blocks)
    if count == 4 and depth in SPREAD:
        return list(SPREAD[depth])
    last_blocks(backbone, count)
    return [(i + 1) * depth // count - 1 for i in range(count)]


def dense(
    backbone: Backbone,
    images: Tensor,
    blocks: Sequence[int],
    norm: bool = True,
    precision: torch.dtype | None = None,
) -> list[Map]:
    """Features of every patch after each of `blocks`, in the order of depth; no gradient goes in.

    Args:
        backbone: in eval mode (`frozen`), with patches.
        images: (b, C, H, W), uint8 or float32 in [0, 1], on the backbone's device, of any size.
        blocks: their numbers, from 0; only the last one of a backbone that has no `layers`.
        norm: after the final norm, or before it.
        precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.

    Raises:
        ValueError: if the backbone has no patches, cannot show these blocks, or takes other channels.
    """
    with torch.inference_mode():
        x = padded(normalised(backbone, images), backbone.patch)
        grid = (x.shape[2] // backbone.patch, x.shape[3] // backbone.patch)
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            tokens = _tokens(backbone, x, blocks, norm)
    if tokens[0].patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{type(backbone).__name__} gives {tokens[0].patches.shape[1]} patch features for a grid of "
            f"{grid[0]} x {grid[1]}: maps need one a patch. For pixels as a baseline take "
            f"backbone.name=raw_patches."
        )
    return [_map(t, grid) for t in tokens]


def padded(x: Tensor, patch: int) -> Tensor:
    """Images (b, C, H, W) with zeros around it, up to multiples of `patch`."""
    left, right, top, bottom = padding(x.shape[2], x.shape[3], patch)
    return F.pad(x, (left, right, top, bottom)) if left + right + top + bottom else x


def padding(height: int, width: int, patch: int) -> tuple[int, int, int, int]:
    """Pixels to add on the left, the right, above and below."""
    across, down = -width % patch, -height % patch
    return across // 2, across - across // 2, down // 2, down - down // 2


def patch_width(backbone: Backbone) -> int:
    """D of a patch feature, found by asking; a backbone without patches is refused.

    Raises:
        ValueError: as `dense`.
    """
    side = backbone.patch * max(1, 32 // backbone.patch)
    blank = torch.zeros(1, backbone.channels, side, side, device=device_of(backbone))
    with frozen(backbone):
        return dense(backbone, blank, last_blocks(backbone, 1))[0].patches.shape[1]


def _tokens(backbone: Backbone, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
    if list(blocks) == last_blocks(backbone, 1) and norm:
        return backbone([x], [None])
    if not hasattr(backbone, "layers"):
        what = "other blocks than its last" if norm else "features before its final norm"
        raise ValueError(
            f"{type(backbone).__name__} cannot show {what}: give it a method `layers` "
            f"(dinokit/models/__init__.py), or ask for the last block alone, after the norm."
        )
    return backbone.layers(x, blocks) if norm else backbone.layers(x, blocks, norm=False)


def _map(tokens: Tokens, grid: tuple[int, int]) -> Map:
    # A copy made outside of inference mode: a head that trains on it saves it for its gradient.
    patches = tokens.patches.transpose(1, 2).unflatten(2, grid)
    return Map(
        patches.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
        tokens.cls.to(torch.float32, copy=True),
    )
