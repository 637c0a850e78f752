"""Stochastic depth and the feed-forward nets."""

import pytest
import torch

from dinokit.models.attention import DropPath, PackedBatch, SwiGLU
from dinokit.models.block import Block


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.4, 0.9])
def test_dropped_branches_leave_the_mean_as_it_was(rate):
    batch = PackedBatch(((7, 3), (10, 2), (1, 4)))
    branch = torch.ones(sum(b * n for b, n in batch.groups), 5)
    for added in batch.split(DropPath(rate)(branch, batch)):
        images = added.shape[0]
        torch.testing.assert_close(added.mean(), torch.ones(()))
        touched = (added != 0).flatten(1)
        assert (touched.all(dim=1) | ~touched.any(dim=1)).all()  # whole images
        assert touched.any(dim=1).sum() == max(int(images * (1 - rate)), 1)


def test_every_image_is_dropped_at_some_time():
    batch, drop_path = PackedBatch(((8, 1),)), DropPath(0.5)
    counts = sum((drop_path(torch.ones(8, 1), batch) != 0).float() for _ in range(400))
    assert counts.min() > 120
    assert counts.max() < 280


def test_evaluation_drops_nothing():
    block = Block(width=8, heads=2, ffn="mlp", layer_scale=1.0, drop_path=0.9).eval()
    x, batch = torch.randn(12, 8), PackedBatch(((4, 3),))
    torch.testing.assert_close(block(x, batch), block(x, batch), rtol=0, atol=0)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_block_is_attention_and_a_feed_forward_net_on_the_residual_stream(ffn, generator):
    block = Block(width=8, heads=2, ffn=ffn, layer_scale=0.5, drop_path=0.0)
    x, batch = torch.randn(12, 8, generator=generator), PackedBatch(((4, 3),))
    y = x + block.attn(block.norm1(x), batch) * block.ls1.gamma
    torch.testing.assert_close(block(x, batch), y + block.mlp(block.norm2(y)) * block.ls2.gamma)


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_is_as_wide_as_in_the_released_files(width, hidden):
    with torch.device("meta"):
        mlp = SwiGLU(width)
    assert mlp.w12.weight.shape == (2 * hidden, width)
    assert mlp.w3.weight.shape == (width, hidden)
