"""Frozen features: what a backbone says of images. Nothing here changes the backbone."""

from dinokit.features.fingerprint import fingerprint
from dinokit.features.frozen import device_of, frozen, last_layers, normalised
from dinokit.features.vectors import Features, Part, extract, spread

__all__ = [
    "Features", "Part", "device_of", "extract", "fingerprint", "frozen", "last_layers", "normalised",
    "spread",
]  # fmt: skip
