"""What the tests share: one thread, and the recorded numbers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

GOLDEN = Path(os.environ.get("DINOKIT_GOLDEN", Path(__file__).parent / "golden"))


class Golden:
    """A recording: arrays by name, and the settings beside them."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        settings = GOLDEN / f"{name}.json"
        self.settings = json.loads(settings.read_text()) if settings.exists() else {}

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def get(self, key: str) -> torch.Tensor | None:
        return torch.from_numpy(np.asarray(self.arrays[key])) if key in self.arrays else None

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}


@pytest.fixture
def golden():
    return Golden


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
