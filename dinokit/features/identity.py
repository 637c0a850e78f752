"""What features depend on, as short texts: which weights, which images."""

from collections.abc import Mapping
from hashlib import blake2b, sha256

import torch
from torch import Tensor, nn

from dinokit.data.sources import ImageSource
from dinokit.features.vectors import Part
from dinokit.models import Backbone, Input

PLAIN = bool, int, float, str, tuple, Input, torch.dtype, type(None)


def fingerprint(module: Backbone | nn.Module) -> str:
    """SHA-256 of all that a file of weights holds, by name: the same whatever kind of file they are in.

    64 hexadecimal digits, which recipes, stores of features and checkpoints hold. It reads every tensor, one
    at a time, to the CPU: about a second a gigabyte.
    """
    assert isinstance(module, nn.Module)
    return _digest(module.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(backbone: Backbone) -> str:
    """Of all tensors, even those that no file holds, and of the modules' plain settings (heads, patch ...).

    Two backbones that share it say the same of an image; 16 hexadecimal digits.
    """
    assert isinstance(backbone, nn.Module)
    done = blake2b(digest_size=8)
    for name, module in backbone.named_modules():
        own = sorted((key, value) for key, value in vars(module).items() if isinstance(value, PLAIN))
        settings = [(key, value) for key, value in own if key != "training"]
        done.update(f"{name} {type(module).__qualname__} {settings}\n".encode())
    state = backbone.state_dict()
    apart = {name: value for name, value in backbone.named_buffers() if name not in state}
    done.update(_digest({**state, **apart}).encode())
    return done.hexdigest()


def images_stamp(source: ImageSource) -> str | None:
    """A text that is another whenever an image of the source may be; None if it gives no such text."""
    if isinstance(source, Part):
        inner = images_stamp(source.source)
        places = blake2b(repr(list(source.places)).encode(), digest_size=16).hexdigest()
        return None if inner is None else f"{inner} {places}"
    stamp = getattr(source, "stamp", None)
    return None if stamp is None else str(stamp())
