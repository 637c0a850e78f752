"""How many loader processes there are, and how much they hold ready."""

import os
from pathlib import Path

import pytest

from dinokit.config.load import CropGroup, Crops
from dinokit.data import loader as module
from dinokit.data.loader import build_loader, training_loader
from dinokit.runtime.distributed import memory

GIB = 2**30

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def machine(monkeypatch):
    """16 cores and 64 GiB, of which 16 may wait."""
    monkeypatch.setattr(module, "cpu_cores", lambda: 16)
    monkeypatch.setattr(module, "memory", lambda: 64 * GIB)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("batch", "asked", "workers", "ready"),
    [
        (0, -1, 15, 2),
        (GIB // 10, -1, 15, 2),
        (GIB, -1, 15, 1),
        (3 * GIB, -1, 5, 1),
        (100 * GIB, -1, 1, 1),
        (3 * GIB, 8, 8, 1),
        (3 * GIB, 2, 2, 2),
        (3 * GIB, 0, 0, None),
    ],
)
def test_batches_that_wait_take_no_more_than_a_quarter_of_the_memory(batch, asked, workers, ready):
    made = build_loader([0], [[0]], list, asked, pin=False, batch_bytes=batch)
    assert (made.num_workers, made.prefetch_factor) == (workers, ready)


@pytest.mark.usefixtures("machine")
def test_a_step_of_two_thousand_images_is_held_once_a_worker():
    crops = Crops(globals=CropGroup(size=224), locals=CropGroup(count=8, size=96))
    # A batch is 2048 * 3 * (2 * 224**2 + 8 * 96**2) = 1.07e9 bytes, and 30 of them are 32 GB.
    made = training_loader(["x"] * 4, crops, None, seed=0, start_step=0, steps=1, batch=2048)
    assert (made.num_workers, made.prefetch_factor) == (15, 1)


def test_memory_is_the_machines_or_less():
    meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    have = (
        int(meminfo.split()[1]) * 1024
        if meminfo
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    assert 2**28 < memory() <= have * 1.01
