"""The backbones, which turn an image into features. A registry: a file here is a `backbone.name` in a recipe.

A file defines `Config`, a dataclass with at least `channels`, and

    build(cfg: Config) -> Backbone
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from dinokit.config import registry


@dataclass
class Tokens:
    """The output of a backbone for a batch of images; everything after the final norm."""

    cls: Tensor  # (b, D)
    registers: Tensor  # (b, R, D); R may be 0
    patches: Tensor  # (b, N, D), row by row over the patch grid


@dataclass(frozen=True)
class Input:
    """The images that the weights were trained on."""

    size: int  # pixels: the side of a global crop
    mean: tuple[float, ...]  # for each channel, in [0, 1]
    std: tuple[float, ...]


class TokenReads(NamedTuple):
    """The tokens that the losses read; everything after the final norm."""

    cls: list[Tensor]  # (b, D) for each group of crops
    patches: Tensor  # (M, D) of the first group


class Backbone(nn.Module):
    """The base class of backbones. Training and evaluation use only what it defines.

    A subclass sets the attributes and defines forward(). It registers its parameters in the order of depth:
    tokens and embeddings, blocks, what follows. One that can be trained with masks has a parameter
    `mask_token` besides.
    """

    width: int  # D
    patch: int  # pixels: every side of a crop is a multiple of it
    channels: int
    blocks: nn.ModuleList  # in the order of depth
    input: Input  # set where a backbone is built for a run, or loaded
    frozen_only: str = ""  # why it cannot be trained, as half a sentence; empty if it can
    licence: str = ""  # of the weights, where the file that they come from names one: exports carry it

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """One Tokens for each group of crops (b, C, h, w) with its mask (b, N), True is hidden, or None."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(crops, masks).")

    def read(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Tensor) -> TokenReads:
        """The tokens that losses read: all class tokens, and some patches of the first group.

        Args:
            crops: as for forward().
            masks: as for forward().
            patches: (M,), indices into the flattened patches (b * N) of the first group.
        """
        tokens = self(crops, masks)
        return TokenReads([t.cls for t in tokens], tokens[0].patches.flatten(0, 1).index_select(0, patches))

    @property
    def has_layers(self) -> bool:
        """Whether layers() is defined."""
        return type(self).layers is not Backbone.layers

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """Tokens of crops (b, C, h, w) after each of `blocks`, in the order of depth.

        Args:
            crops: one group.
            blocks: their numbers, from 0.
            norm: apply the final norm to each.

        Raises:
            ValueError: if there is no such block.
        """
        name = type(self).__name__
        raise ValueError(f"{name} gives its last block only, after the final norm: it defines no layers().")


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Refuse numbers of blocks that a backbone of this depth does not have.

    Raises:
        ValueError: naming those that it has.
    """
    if not set(blocks) <= set(range(depth)):
        raise ValueError(f"Blocks {sorted(set(blocks))} do not all exist: they are 0 to {depth - 1}.")


def build(section: Mapping[str, Any]) -> Backbone:
    """The backbone that a recipe's section describes: `name` is its file, the rest is that file's Config.

    Raises:
        LookupError: if there is no such file.
        ValueError: if the file builds something else.
    """
    backbone = registry.build("models", section)
    if not isinstance(backbone, Backbone):
        kind = type(backbone).__name__
        raise ValueError(
            f"backbone.name={section['name']} builds a {kind}, which is no Backbone. Let it inherit from "
            f"the base class: `from dinokit.models import Backbone` and `class {kind}(Backbone):`."
        )
    return backbone
