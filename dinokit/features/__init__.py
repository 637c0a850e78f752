"""Features of a frozen backbone: vectors, feature maps, attention, and stores of them on disk."""

from dinokit.features.extract import Features, Subset, cached, extract, load_cached, spread, spread_places
from dinokit.features.extract_store import Extraction, ExtractSpec, extract_to
from dinokit.features.store import Store, open_store
from dinokit.features.tokens import (
    AllPatches,
    Map,
    Pooling,
    attention,
    dense,
    device_of,
    fingerprint,
    frozen,
    last_blocks,
    last_layers,
    normalised,
    patch_width,
    spread_blocks,
)

__all__ = [
    "AllPatches", "ExtractSpec", "Extraction", "Features", "Map", "Pooling", "Store", "Subset",
    "attention", "cached", "dense", "device_of", "extract", "extract_to", "fingerprint", "frozen",
    "last_blocks", "last_layers", "load_cached", "normalised", "open_store", "patch_width",
    "spread", "spread_blocks", "spread_places",
]  # fmt: skip
