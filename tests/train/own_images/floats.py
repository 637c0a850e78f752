"""Images of floats, of which one has pixels that are no numbers. Files with such pixels cannot be read."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Config:
    images: int = 12
    bad: int = 7  # the number of the image


class Floats:
    """Images (48, 48, 3)."""

    classes = ()

    def __init__(self, cfg):
        self.cfg = cfg

    def __len__(self):
        return self.cfg.images

    def name(self, index):
        """As a file would be called."""
        return f"{index:02}.npy"

    def __getitem__(self, index):
        small = np.random.default_rng(index).random((6, 6, 3), dtype=np.float32)
        pixels = np.kron(small, np.ones((8, 8, 1), np.float32))
        return np.full_like(pixels, np.nan) if index == self.cfg.bad else pixels, -1


def build(cfg):
    """The source."""
    return Floats(cfg)
