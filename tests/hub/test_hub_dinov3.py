"""Entry points of DINOv3: never a download, a file of the user's own, and the official methods."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

import dinokit
from dinokit.hub import RELEASED
from dinokit.hub.dinov3 import ConvNeXt, DINOv3
from dinokit.hub.entry import cached_path
from dinokit.models import dinov3

hubconf = SimpleNamespace(**run_path(str(Path(__file__).parents[2] / "hubconf.py")))
SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "layer_scale": 1.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DINOv3(dinov3.DINOv3(dinov3.Config(**SMALL))).eval()


def test_without_a_file_it_says_where_to_put_one_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    monkeypatch.setitem(dinov3.SIZES, "vits16", SMALL)
    with pytest.raises(
        LookupError, match=r"dinov3_vits16_.*-08c60483.pth is not at .*DINOv3 License.*weights=PATH"
    ):
        hubconf.dinov3_vits16()
    torch.manual_seed(1)
    vit = dinov3.DINOv3(dinov3.Config(**SMALL))
    path = cached_path(RELEASED["dinov3_vits16"].url)
    path.parent.mkdir(parents=True)
    torch.save(vit.state_dict(), path)
    x = torch.randn(1, 3, 16, 24)
    for loaded in (hubconf.dinov3_vits16(), hubconf.dinov3_vits16(pretrained=False, weights=path)):
        assert set(loaded.state_dict()) == set(vit.state_dict())
        torch.testing.assert_close(loaded.eval()(x), vit.eval()([x], [None])[0].cls)
    assert dinokit.create_model("dinov3_vits16", pretrained=True).input.mean == (0.485, 0.456, 0.406)
    with pytest.raises(TypeError, match="takes no interpolate_offset; it takes img_size, in_chans"):
        hubconf.dinov3_vits16(pretrained=False, interpolate_offset=0.1)


def test_a_file_of_timm_which_leaves_out_biases_of_zero_is_read(tmp_path, monkeypatch):
    size = {"embed_dim": 64, "depth": 2, "num_heads": 1}
    torch.manual_seed(2)
    theirs = timm.create_model("vit_small_patch16_dinov3", num_classes=0, init_values=1.0, **size).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    assert not any("qkv.bias" in name for name in theirs.state_dict())
    ours = {"width": 64, "depth": 2, "heads": 1, "patch": 16}
    monkeypatch.setitem(dinov3.SIZES, "vits16", ours)
    loaded = hubconf.dinov3_vits16(weights=tmp_path / "timm.safetensors").eval()
    x = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(loaded(x), theirs.forward_features(x)[:, 0], rtol=1e-4, atol=1e-5)
    assert set(loaded.state_dict()) == set(dinov3.DINOv3(dinov3.Config(**ours)).state_dict())


def test_the_methods_are_those_of_dinov3(model):
    x, mask = torch.randn(2, 3, 16, 24), torch.zeros(2, 6, dtype=torch.bool)
    features = model(x, mask, is_training=True)
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {
        "x_norm_clstoken": (2, 32), "x_storage_tokens": (2, 4, 32), "x_norm_patchtokens": (2, 6, 32),
        "x_prenorm": (2, 11, 32), "masks": (2, 6),
    }  # fmt: skip
    assert torch.equal(model(x), features["x_norm_clstoken"])
    both = model([x, x[:, :, :8, :8]], is_training=True)
    torch.testing.assert_close(both[0]["x_norm_patchtokens"], features["x_norm_patchtokens"])
    first, last = model.get_intermediate_layers(
        x, n=2, reshape=True, return_class_token=True, return_extra_tokens=True
    )
    assert [tuple(t.shape) for t in first] == [(2, 32, 2, 3), (2, 32), (2, 4, 32)]
    torch.testing.assert_close(last[1], model(x))
    (patches,) = model.get_intermediate_layers(x, n=[1])
    torch.testing.assert_close(patches, features["x_norm_patchtokens"])


def test_positions_have_noise_in_training_alone(model):
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_convnext_has_the_same_calls():
    with torch.device("meta"):
        model = hubconf.dinov3_convnext_tiny(pretrained=False)
        features = model(torch.empty(1, 3, 64, 96), is_training=True)
    assert isinstance(model, ConvNeXt)
    assert features["x_norm_clstoken"].shape == (1, 768)
    assert features["x_norm_patchtokens"].shape == (1, 6, 768)
