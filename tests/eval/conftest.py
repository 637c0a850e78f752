"""A backbone whose features are a choice of the test, and images to show it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinokit.models import Backbone, Input, Tokens

HUES = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


class Mean(Backbone):
    """Four blocks; block i's class token is the mean colour, turned by i; a patch is the colour of 4 x 4."""

    def __init__(self, channels=3):
        super().__init__()
        self.width, self.patch, self.channels = channels, 4, channels
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(4))
        self.input = Input(16, (0.0,) * channels, (1.0,) * channels)
        self.gain = nn.Parameter(torch.full((), 4.0))
        self.calls = 0

    def forward(self, crops, masks):
        return [self.layers(x, [3])[0] for x in crops]

    def layers(self, crops, blocks, norm=True):
        self.calls += 1
        patches = torch.nn.functional.avg_pool2d(crops, 4).flatten(2).transpose(1, 2) * self.gain
        cls = patches.mean(dim=1)
        return [Tokens(cls.roll(i - 3, 1), patches[:, :0], patches) for i in blocks]


def paint(root, counts, noise=60):
    """Folders root/NAME with images in the colour of their name, every image moved by up to `noise`."""
    rng = np.random.default_rng(list(root.name.encode()))
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            colour = np.clip(np.array(HUES[name]) + rng.integers(-noise, noise + 1, 3), 0, 255).astype(
                np.uint8
            )
            Image.fromarray(np.tile(colour, (20, 24, 1))).save(root / name / f"{name}{i}.png")
    return {"name": "folder", "path": str(root), "labels": "folders"}


@pytest.fixture
def mean():
    return Mean()


@pytest.fixture
def colours(tmp_path):
    train = paint(tmp_path / "a", {"red": 12, "green": 10, "blue": 8})
    return {"train": train, "test": paint(tmp_path / "b", {"red": 3, "green": 4, "blue": 5})}
