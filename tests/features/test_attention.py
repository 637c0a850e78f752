"""Attention weights against what the network's own kernel made of them."""

import copy

import pytest
import torch

from dinokit.config import registry
from dinokit.features.tokens import attention
from dinokit.models import timm_vit


@pytest.fixture(params=["vit", "timm", "timm with norms"])
def backbone(request, vit):
    if request.param == "vit":
        return vit
    torch.manual_seed(1)
    net = timm_vit.build(timm_vit.Config(model="vit_tiny_patch16_224", size=32))
    for block in net.blocks:
        if request.param == "timm with norms":
            block.attn.q_norm, block.attn.k_norm = torch.nn.LayerNorm(64), torch.nn.LayerNorm(64)
            torch.nn.init.normal_(block.attn.q_norm.weight, 1, 0.3)
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return net.eval()


@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_times_values_equals_the_output_of_the_kernel(backbone, block):
    """The class token's row before the output projection is the sum of weights times values."""
    crops = torch.randn(2, 3, 32, 48 if backbone.patch == 8 else 32)
    layer = backbone.blocks[block].attn
    seen = {}
    hooks = [
        layer.qkv.register_forward_hook(lambda _, __, out: seen.update(qkv=out)),
        layer.proj.register_forward_pre_hook(lambda _, given: seen.update(mixed=given[0])),
    ]
    with torch.no_grad():
        backbone([crops], [None])
    for hook in hooks:
        hook.remove()
    weights = attention(backbone, crops, block)
    heads = weights.shape[1]
    values = seen["qkv"].reshape(2, -1, 3, heads, backbone.width // heads)[:, :, 2]  # (b, T, H, d)
    want = seen["mixed"].reshape(2, -1, backbone.width)[:, 0]
    got = torch.einsum("bht,bthd->bhd", weights, values).flatten(1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, heads))
    assert weights.std() > 1e-3  # not uniform: the test could fail


def test_the_backbone_does_not_change(vit):
    vit.train()
    state = copy.deepcopy(vit.state_dict())
    attention(vit, torch.randn(1, 3, 32, 32))
    assert vit.training
    assert not any(block.attn.qkv._forward_hooks for block in vit.blocks)
    assert all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())


def test_a_missing_block_is_refused(vit):
    with pytest.raises(ValueError, match="block=3: the backbone has 3 blocks"):
        attention(vit, torch.randn(1, 3, 32, 32), 3)
    pixels = registry.build("models", {"name": "pixels"})
    with pytest.raises(ValueError, match="block=-1: the backbone has 0 blocks"):
        attention(pixels, torch.randn(1, 3, 32, 32))
    vit.blocks[2].attn.qkv = torch.nn.Identity()
    with pytest.raises(ValueError, match="no attention with one linear layer"):
        attention(vit, torch.randn(1, 3, 32, 32))
