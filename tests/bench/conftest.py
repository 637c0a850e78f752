import pytest

from dinokit import bench


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The speed of a processor is measured by products of small matrices, which take no second."""
    monkeypatch.setitem(bench.SIDE, "cpu", 256)
