"""Which weights features came from."""

from hashlib import sha256

from torch import nn, uint8

from dinokit.backbones import Backbone


def fingerprint(backbone: Backbone | nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name: the same for the same weights in whatever kind of file.

    Reads every tensor to the CPU once, one at a time.
    """
    assert isinstance(backbone, nn.Module)
    digest = sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(uint8).numpy())
    return digest.hexdigest()
