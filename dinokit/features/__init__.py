"""Frozen features: what a backbone says of images. Nothing here changes the backbone."""

from dinokit.features.cache import cached, kept
from dinokit.features.frozen import device_of, frozen, last_layers, normalised
from dinokit.features.identity import weights_hash
from dinokit.features.reading import Reading
from dinokit.features.vectors import Features, Part, extract, readable, spread

__all__ = [
    "Features", "Part", "Reading", "cached", "device_of", "extract", "frozen", "kept", "last_layers",
    "normalised", "readable", "spread", "weights_hash",
]  # fmt: skip
