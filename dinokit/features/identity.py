"""What features depend on, as short texts: which weights, which images."""

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.backbones import Backbone, Input
from dinokit.data.sources import Source
from dinokit.features.vectors import Part

PLAIN = bool, int, float, str, tuple, Input, torch.dtype, type(None)


def weights_hash(backbone: Backbone) -> str:
    """Of every parameter and buffer, and of the modules' own plain settings, such as the number of heads.

    Two backbones that share it say the same of an image; 16 hexadecimal digits. It reads all weights: about a
    second a gigabyte.
    """
    assert isinstance(backbone, nn.Module)
    done = blake2b(digest_size=8)
    for name, module in backbone.named_modules():
        own = sorted((key, value) for key, value in vars(module).items() if isinstance(value, PLAIN))
        settings = [(key, value) for key, value in own if key != "training"]
        done.update(f"{name} {type(module).__qualname__} {settings}\n".encode())
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        done.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        done.update(_bytes(tensor))
    return done.hexdigest()


def images_stamp(source: Source) -> str | None:
    """A text that is another whenever an image of the source may be; None if it gives no such text."""
    if isinstance(source, Part):
        inner = images_stamp(source.source)
        places = blake2b(repr(list(source.places)).encode(), digest_size=16).hexdigest()
        return None if inner is None else f"{inner} {places}"
    stamp = getattr(source, "stamp", None)
    return None if stamp is None else str(stamp())


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
