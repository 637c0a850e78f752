"""Frozen features: what a backbone says of images. Nothing here changes the backbone."""

from dinokit.features.attention import attention
from dinokit.features.cache import cached, halfway, kept
from dinokit.features.dense import Map, dense, last_blocks, patch_width, spread_blocks
from dinokit.features.extraction import Extraction, extract_to
from dinokit.features.fingerprint import fingerprint, images_stamp
from dinokit.features.frozen import device_of, frozen, last_layers, normalised
from dinokit.features.reading import Reading
from dinokit.features.store import Store, open_store
from dinokit.features.vectors import Features, Part, extract, spread
from dinokit.features.wanted import Wanted

__all__ = [
    "Extraction", "Features", "Map", "Part", "Reading", "Store", "Wanted", "attention", "cached", "dense",
    "device_of", "extract", "extract_to", "fingerprint", "frozen", "halfway", "images_stamp", "kept",
    "last_blocks", "last_layers", "normalised", "open_store", "patch_width", "spread",
    "spread_blocks",
]  # fmt: skip
