"""Runs a frozen backbone on images, and turns its tokens into one vector per image or into feature maps.

b  images     C  channels     D  width of the backbone     N  patches     h, w  patches down and across
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.models import Backbone, Tokens

GEM_POWER, GEM_MIN = 4.0, 1e-6  # of DINO's copy detection
# Blocks that DINOv2's depth heads use, by the depth of the backbone.
SPREAD = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """Eval mode inside the block; after it each module is in the mode that it was in."""
    before = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def device_of(backbone: Backbone) -> torch.device:
    """The device of the backbone's parameters, or else of its buffers."""
    return next((t.device for t in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))


def normalised(backbone: Backbone, crops: Tensor) -> Tensor:
    """Crops (b, C, H, W), uint8 or float32 in [0, 1], normalised by the backbone's mean and std.

    Raises:
        ValueError: if C is not the backbone's number of channels.
    """
    if crops.shape[1] != backbone.channels:
        raise ValueError(
            f"The images have {crops.shape[1]} channels, but the backbone takes {backbone.channels}: give it "
            f"images like those that it was trained on."
        )
    mean, std = (
        torch.tensor(v, device=crops.device).view(-1, 1, 1) for v in (backbone.input.mean, backbone.input.std)
    )
    x = crops.float() / 255 if crops.dtype == torch.uint8 else crops.float()
    return (x - mean) / std


def block_tokens(backbone: Backbone, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
    """Tokens after each of `blocks`, in the order of depth.

    Args:
        backbone: one without `layers` gives its last block only.
        crops: (b, C, H, W), normalised, with sides that are multiples of the patch.
        blocks: indices from 0; [-1] for a backbone without blocks: its output.
        norm: after the final norm, or before it.

    Raises:
        ValueError: if the backbone does not give these.
    """
    if list(blocks) == last_blocks(backbone, 1) and norm:
        return backbone([crops], [None])
    return backbone.layers(crops, blocks, norm)


def last_layers(backbone: Backbone, crops: Tensor, count: int) -> list[Tokens]:
    """Tokens after each of the last `count` blocks, as block_tokens() with last_blocks().

    Raises:
        ValueError: if the backbone does not give so many.
    """
    return block_tokens(backbone, crops, last_blocks(backbone, count))


@dataclass(frozen=True)
class Pooling:
    """Pools tokens into one vector per image: class tokens of the last blocks, then pooled patches.

    The class tokens stand in the order of depth; the patches are those of the last block. blocks=4 and
    pool='mean' give the input of the released four-block classifiers (DINOv2, arXiv 2304.07193, appendix
    B.3); the input for fewer blocks is the columns at its right.
    """

    blocks: int = 1  # class tokens of so many last blocks
    pool: Literal["none", "mean", "gem"] = "none"  # gem: generalised mean, fourth power (arXiv 1711.02512)

    def width(self, backbone: Backbone) -> int:
        """Numbers in a vector."""
        return backbone.width * (self.blocks + (self.pool != "none"))

    def __call__(self, backbone: Backbone, crops: Tensor) -> Tensor:
        """Normalised crops (b, C, H, W) -> (b, width) float32.

        Raises:
            ValueError: if the backbone gives fewer blocks, or has no patches to pool.
        """
        layers = last_layers(backbone, crops, self.blocks)
        columns = [tokens.cls.float() for tokens in layers]
        if self.pool != "none":
            patches = layers[-1].patches.float()
            if not patches.shape[1]:
                raise ValueError(f"{type(backbone).__name__} gives no patches that could be pooled.")
            columns.append(patches.mean(dim=1) if self.pool == "mean" else generalised_mean(patches))
        return torch.cat(columns, dim=1)


def generalised_mean(patches: Tensor) -> Tensor:
    """GeM pooling: the fourth root of the mean of fourth powers of positive values. (b, N, D) -> (b, D)."""
    return patches.clamp(min=GEM_MIN).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)


@dataclass
class Map:
    """Features of a batch of images after one block."""

    patches: Tensor  # (b, D, h, w) float32
    cls: Tensor  # (b, D) float32

    def with_cls(self) -> Tensor:
        """(b, 2 D, h, w): each patch concatenated with the class token."""
        return torch.cat([self.patches, self.cls[:, :, None, None].expand_as(self.patches)], dim=1)


def last_blocks(backbone: Backbone, count: int) -> list[int]:
    """Indices of the last `count` blocks; [-1] for a backbone without blocks: its output.

    Raises:
        ValueError: if there are not so many.
    """
    depth = len(backbone.blocks)
    if count == 1:
        return [depth - 1]
    if count > depth:
        raise ValueError(
            f"{count} blocks were asked for, but {type(backbone).__name__} has {depth or 'none'}: "
            f"ask for fewer."
        )
    return list(range(depth - count, depth))


def spread_blocks(backbone: Backbone, count: int) -> list[int]:
    """Indices of `count` blocks at equal distances, with the last one.

    For four blocks of a backbone with 12, 24 or 40 blocks, they are those of DINOv2's depth heads.

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
    """Feature maps after each of `blocks`, in the order of depth, without gradient.

    Images are padded with zeros, the mean colour, to multiples of the patch, equally on all sides; an odd
    pixel goes to the right and to the bottom.

    Args:
        backbone: in eval mode (`frozen`), with patches.
        images: (b, C, H, W), uint8 or float32 in [0, 1], on the backbone's device, of any size.
        blocks: indices from 0; only the last one of a backbone that has no `layers`.
        norm: after the final norm, or before it.
        precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.

    Raises:
        ValueError: if the backbone has no patches, cannot give these blocks, or has other channels.
    """
    with torch.inference_mode():
        x = padded(normalised(backbone, images), backbone.patch)
        grid = (x.shape[2] // backbone.patch, x.shape[3] // backbone.patch)
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            tokens = block_tokens(backbone, x, blocks, norm)
    if tokens[0].patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{type(backbone).__name__} gives {tokens[0].patches.shape[1]} patch features for a grid of "
            f"{grid[0]} x {grid[1]}: maps need one for each patch. For pixels as a baseline take "
            f"backbone.name=raw_patches."
        )
    return [_map(t, grid) for t in tokens]


def padded(x: Tensor, patch: int) -> Tensor:
    """Images (b, C, H, W) with zeros around them, up to multiples of `patch`."""
    left, right, top, bottom = padding(x.shape[2], x.shape[3], patch)
    return F.pad(x, (left, right, top, bottom)) if left + right + top + bottom else x


def padding(height: int, width: int, patch: int) -> tuple[int, int, int, int]:
    """Pixels to add at the left, the right, the top and the bottom."""
    across, down = -width % patch, -height % patch
    return across // 2, across - across // 2, down // 2, down - down // 2


def patch_width(backbone: Backbone) -> int:
    """Numbers in a patch feature, found by running the backbone on a blank image.

    Raises:
        ValueError: as `dense`.
    """
    side = backbone.patch * max(1, 32 // backbone.patch)
    blank = torch.zeros(1, backbone.channels, side, side, device=device_of(backbone))
    with frozen(backbone):
        return dense(backbone, blank, last_blocks(backbone, 1))[0].patches.shape[1]


def _map(tokens: Tokens, grid: tuple[int, int]) -> Map:
    # A copy made outside of inference mode: a head that trains on it saves it for its gradient.
    patches = tokens.patches.transpose(1, 2).unflatten(2, grid)
    return Map(
        patches.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
        tokens.cls.to(torch.float32, copy=True),
    )
