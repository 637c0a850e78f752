"""What turns an image into features. A shelf: a file here is a `backbone.name` in a recipe.

A file defines `Config`, a dataclass with at least `channels`, and

    build(cfg: Config) -> Backbone
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn


@dataclass
class Tokens:
    """What a backbone says of a batch of images; everything after the final norm."""

    cls: Tensor  # (b, D)
    registers: Tensor  # (b, R, D); R may be 0
    patches: Tensor  # (b, N, D), row by row over the patch grid


@dataclass(frozen=True)
class Input:
    """What the weights were trained to see."""

    size: int  # pixels: the side of a global crop
    mean: tuple[float, ...]  # one a channel, in [0, 1]
    std: tuple[float, ...]


class Backbone(Protocol):
    """An nn.Module with these; they are all that training and evaluation know of a backbone.

    One that can be trained with masks has a parameter `mask_token` besides. One whose blocks can be looked
    into has

        layers(crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]

    which gives for crops (b, C, h, w) the Tokens after each of these blocks, numbered from 0, in the order of
    depth, each after the final norm or, without `norm`, before it; it raises ValueError if there is no such
    block. One that can spare what nobody reads has

        read(crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Tensor)
            -> tuple[list[Tensor], Tensor]

    which gives the class tokens (b, D) of each group, and of the first group the patches (M, D) whose places
    in its flattened (b * N) are `patches` (M,), all as a call gives them.
    """

    width: int  # D
    patch: int  # pixels: every side of a crop is a multiple of it
    channels: int
    blocks: nn.ModuleList  # in order of depth
    input: Input  # set by whoever made the backbone for a purpose

    def eval(self) -> Self:
        """Turn to evaluation."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move to a device."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, in the order of depth: tokens and embeddings, blocks, what follows."""
        ...

    def __call__(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """One Tokens for each group of crops (b, C, h, w) with its mask (b, N), True is hidden, or none."""
        ...
