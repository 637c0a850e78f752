"""Tokens of the last blocks, compared with the backbone's own forward pass."""

import pytest
import torch

from dinokit.features import last_layers
from dinokit.models import Backbone, timm_vit, vit


@pytest.fixture(params=["vit", "timm_vit"])
def backbone(request):
    torch.manual_seed(0)
    if request.param == "vit":
        net = vit.build(
            vit.Config(size=32, width=24, depth=3, heads=2, patch=8, layer_scale=1.0, registers=2)
        )
    else:
        net = timm_vit.build(timm_vit.Config(model="vit_tiny_patch16_224", size=32))
    return net.eval()


def same(a, b):
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("cls", "registers", "patches"))


@torch.inference_mode()
def test_the_last_of_the_last_blocks_is_the_output(backbone):
    x = torch.randn(2, 3, 32, 32)
    depth = len(backbone.blocks)
    layers = last_layers(backbone, x, depth)
    assert len(layers) == depth
    assert same(layers[-1], backbone([x], [None])[0])
    assert same(last_layers(backbone, x, 1)[0], layers[-1])
    assert not same(layers[0], layers[1])


@torch.inference_mode()
def test_an_inner_block_is_the_output_of_a_shorter_backbone(backbone):
    x = torch.randn(2, 3, 32, 32)
    early = backbone.layers(x, [0])
    net = getattr(backbone, "net", backbone)
    net.blocks = net.blocks[:1]
    assert same(early[0], backbone([x], [None])[0])


def test_missing_blocks_are_refused(backbone):
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="99 blocks were asked for, but"):
        last_layers(backbone, x, 99)
    with pytest.raises(ValueError, match="they are 0 to"):
        backbone.layers(x, [0, 99])


def test_a_backbone_without_layers_gives_its_last_block_only():
    class Blind(Backbone):
        blocks = torch.nn.ModuleList([torch.nn.Identity()] * 2)

        def forward(self, crops, masks):
            return crops

    assert last_layers(Blind(), "x", 1) == ["x"]
    with pytest.raises(ValueError, match="Blind gives its last block only"):
        last_layers(Blind(), "x", 2)
