"""A backbone filled from a file gives the features of the file's own backbone."""

import pytest
import torch

from dinokit.models.vit import Config, VisionTransformer
from dinokit.weights import fill, load_backbone

SMALL = {"size": 32, "width": 128, "depth": 2, "heads": 2, "patch": 8, "layer_scale": 1.0}


def drawn(**changes) -> VisionTransformer:
    """Every tensor is drawn, so that each one counts."""
    vit = VisionTransformer(Config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.2)
    return vit


@pytest.fixture
def file(tmp_path):
    """DINOv2's pretrain file with a 4 x 4 grid."""
    torch.manual_seed(0)
    torch.save(drawn().state_dict(), tmp_path / "small_pretrain.pth")
    return tmp_path / "small_pretrain.pth"


@pytest.mark.parametrize("size", [16, 32, 48])
@torch.no_grad()
def test_a_filled_backbone_of_another_size_gives_the_features_of_the_file(file, size):
    backbone = drawn(size=size, drop_path=0.3)
    coverage = fill(backbone, file)
    assert coverage.complete
    x = torch.randn(2, 3, size, size)
    for name in ("cls", "patches"):
        want, have = (getattr(b([x], [None])[0], name) for b in (load_backbone(file), backbone))
        torch.testing.assert_close(have, want)
    assert coverage.resampled == (
        "" if size == 32 else f"pos_embed resampled from 4 x 4 to {size // 8} x {size // 8}"
    )


def test_a_filled_backbone_stays_trainable_and_in_its_mode(file):
    backbone = drawn().train()
    fill(backbone, file)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.training


def test_missing_and_left_over_tensors_are_refused_unless_tolerated(file):
    backbone = drawn(registers=2)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"register_tokens: asked for \(1, 2, 128\), absent.*`tolerate`"):
        fill(backbone, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    coverage = fill(backbone, file, tolerate=["register_*"])
    assert list(coverage.missing) == ["register_tokens"]
    assert torch.equal(backbone.register_tokens, before["register_tokens"])
    assert not torch.equal(backbone.cls_token, before["cls_token"])

    without = drawn(mask_token=False)
    with pytest.raises(ValueError, match=r"mask_token: not asked for, found \(1, 128\)"):
        fill(without, file)
    assert list(fill(without, file, tolerate=["mask_token"]).left_over) == ["mask_token"]


def test_a_shape_that_does_not_fit_is_never_tolerated(file):
    with pytest.raises(ValueError, match=r"cls_token: asked for \(1, 1, 64\), found \(1, 1, 128\)"):
        fill(drawn(width=64), file, tolerate=["*"])
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight: asked for \(128, 3, 16, 16\)"):
        fill(drawn(patch=16), file)


def test_another_number_of_heads_is_refused(file):
    with pytest.raises(ValueError, match="heads: asked for 4, found 2"):
        fill(drawn(heads=4), file)
    assert fill(drawn(heads=4), file, heads=4).complete
