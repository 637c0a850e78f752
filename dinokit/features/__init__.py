"""Frozen features: what a backbone says of images. Nothing here changes the backbone."""

from dinokit.features.attention import attention
from dinokit.features.extraction import Extraction, extract_to
from dinokit.features.fingerprint import fingerprint
from dinokit.features.frozen import device_of, frozen, last_layers, normalised
from dinokit.features.store import Store, open_store
from dinokit.features.vectors import Features, Part, extract, spread
from dinokit.features.wanted import Wanted

__all__ = [
    "Extraction", "Features", "Part", "Store", "Wanted", "attention", "device_of", "extract",
    "extract_to", "fingerprint", "frozen", "last_layers", "normalised", "open_store", "spread",
]  # fmt: skip
