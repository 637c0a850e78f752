"""timm's ViTs behind our contract: timm itself is the oracle."""

import pytest
import torch

from dinokit.models.timm_vit import Config, TimmViT


def model(**values) -> TimmViT:
    return TimmViT(Config(**{"model": "vit_tiny_patch16_224", "size": 64, **values})).eval()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_features_are_timms_own(name, generator):
    ours = model(model=name, size=56 if "14" in name else 64)
    x = torch.randn(2, 3, ours.patch * 4, ours.patch * 4, generator=generator)
    want = ours.net.forward_features(x)
    (got,) = ours([x], [None])
    prefix = ours.net.num_prefix_tokens
    torch.testing.assert_close(got.cls, want[:, 0])
    torch.testing.assert_close(got.registers, want[:, 1:prefix])
    torch.testing.assert_close(got.patches, want[:, prefix:])


@torch.no_grad()
def test_other_sizes_and_masks(generator):
    ours = model()
    x, y = torch.randn(2, 3, 64, 64, generator=generator), torch.randn(1, 3, 32, 48, generator=generator)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3] = True
    big, small = ours([x, y], [mask, None])
    assert small.patches.shape == (1, 6, ours.width)
    x[:, :, 0:16, 48:64] = 0  # patch 3, the last of the first row
    torch.testing.assert_close(ours([x], [mask])[0].cls, big.cls)


def test_parameters_come_in_the_order_of_depth():
    names = [name for name, _ in model().named_parameters()]
    first, last = names.index("net.blocks.0.norm1.weight"), names.index("net.norm.weight")
    before = {
        "mask_token",
        "net.cls_token",
        "net.pos_embed",
        "net.patch_embed.proj.weight",
        "net.patch_embed.proj.bias",
    }
    assert before == set(names[:first])
    assert all(".blocks." in name for name in names[first:last])


def test_what_is_no_vit_is_refused_and_a_typo_answered():
    with pytest.raises(LookupError, match="Did you mean 'vit_tiny_patch16_224'"):
        model(model="vit_tiny_patch16_22")
    with pytest.raises(ValueError, match=r"not a plain ViT|no ViT with a class token"):
        model(model="resnet18")
