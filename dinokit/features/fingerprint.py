"""Short texts that identify weights and images: the fingerprint of a backbone, the stamp of a source."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from dinokit.data.sources import ImageSource
from dinokit.models import Input

PLAIN = bool, int, float, str, tuple, Input, torch.dtype, type(None)


def fingerprint(module: nn.Module, *, settings: bool = False) -> str:
    """SHA-256 of a module's tensors, as 64 hexadecimal digits.

    By default it covers what a file of weights contains: name, type, shape and values of every tensor in
    state_dict(). It does not depend on the file format. Recipes, feature stores and checkpoints contain it.

    With `settings` it also covers what no file contains: buffers that are not saved, and the modules' plain
    attributes (number of heads, patch size ...). Backbones with the same value compute the same features.
    Use it for caches and results; it may change with the version of dinokit.

    It copies every tensor to the CPU, one at a time: about one second for each gigabyte.
    """
    state = module.state_dict()
    if not settings:
        return _digest(state)
    unsaved = {name: value for name, value in module.named_buffers() if name not in state}
    attributes = "".join(f"{name} {_attributes(child)}\n" for name, child in module.named_modules())
    return sha256((attributes + _digest({**state, **unsaved})).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attributes(module: nn.Module) -> str:
    plain = sorted((key, value) for key, value in vars(module).items() if isinstance(value, PLAIN))
    return f"{type(module).__qualname__} {[(key, value) for key, value in plain if key != 'training']}"


def images_stamp(source: ImageSource) -> str | None:
    """A text that changes whenever an image of the source may have changed; None if the source has none."""
    stamp = getattr(source, "stamp", None)
    text = stamp() if stamp is not None else None
    return None if text is None else str(text)
