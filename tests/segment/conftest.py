import pytest
import torch

from dinokit.models import build
from dinokit.segment.prompts import BACKGROUND, FOREGROUND, PADDING, Prompt


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return build({"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}).eval()


@pytest.fixture
def prompt():
    """Three objects of two images: with two clicks, with a click and a box, and with a box alone."""
    nan = float("nan")
    return Prompt(
        torch.tensor([1, 0, 1]),
        torch.tensor([[[3.0, 4.0], [20.0, 9.0]], [[7.0, 7.0], [0.0, 0.0]], [[0.0, 0.0], [5.0, 5.0]]]),
        torch.tensor([[FOREGROUND, BACKGROUND], [FOREGROUND, PADDING], [PADDING, PADDING]]),
        torch.tensor([[nan] * 4, [2.0, 3.0, 15.0, 30.0], [0.0, 8.0, 31.0, 16.0]]),
    )


@pytest.fixture
def embedded(head):
    """Two images of 16 patches for the test file's own `head`."""
    torch.manual_seed(2)
    return head.embed(torch.randn(2, 12, 4, 4), torch.randn(2, 3, 32, 32))
