"""A backbone held still: in eval mode for a while, shown what it was trained to see."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dinokit.models import Backbone, Tokens


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """Eval mode inside the block; after it each module is in the mode that it was in."""
    assert isinstance(backbone, nn.Module)
    before = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def normalised(backbone: Backbone, crops: Tensor) -> Tensor:
    """Crops (b, C, h, w), uint8 or float32 in [0, 1], as the backbone was trained to see them.

    Raises:
        ValueError: if C is not what the backbone takes.
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


def last_layers(backbone: Backbone, crops: Tensor, count: int) -> list[Tokens]:
    """Tokens after each of the last `count` blocks, in the order of depth, each after the final norm.

    Args:
        backbone: one without `layers` has its last block alone to show.
        crops: (b, C, h, w), normalised.
        count: 1 or more.

    Raises:
        ValueError: if the backbone does not show so many.
    """
    depth = len(backbone.blocks)
    if count == 1:
        return backbone([crops], [None])
    if not hasattr(backbone, "layers"):
        raise ValueError(
            f"{type(backbone).__name__} shows its last block alone, and {count} were asked for: give it a "
            f"method `layers` (dinokit/models/__init__.py), or ask for one."
        )
    if count > depth:
        raise ValueError(f"{count} blocks were asked for, but the backbone has {depth}.")
    return backbone.layers(crops, range(depth - count, depth))


def device_of(backbone: Backbone) -> torch.device:
    """Where the backbone's parameters, or else its buffers, are."""
    assert isinstance(backbone, nn.Module)
    return next((t.device for t in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
