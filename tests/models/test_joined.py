"""Encoders side by side: each one alone, concatenated by hand, is the oracle."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dinokit.commands import Command, models
from dinokit.config.load import load_recipe
from dinokit.features import fingerprint, last_layers
from dinokit.models import Input, Tokens, build
from dinokit.models.joined import Joined
from dinokit.train.networks import build_backbone
from dinokit.weights import build_section, load_backbone, save_backbone
from dinokit.weights.formats import export

TINY = "vit_tiny_patch16_224"
VIT = {"name": "vit", "width": 32, "depth": 3, "heads": 2, "patch": 8, "size": 32}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
TIMM = {"name": "timm_any", "model": "vit_base_patch16_siglip_224", "args": SMALL, "size": 32}


def two(first=VIT, second=TIMM):
    torch.manual_seed(0)
    a, b = build(first).eval(), build(second).eval()
    a.input, b.input = Input(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), Input(64, (0.5,) * 3, (0.5,) * 3)
    return a, b, Joined([a, b]).eval()


@torch.no_grad()
def test_tokens_are_those_of_each_encoder_on_the_grid_of_the_first(generator):
    a, b, both = two()
    raw = torch.rand(2, 3, 48, 64, generator=generator)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (a.input.mean, a.input.std))
    x, y = (raw - mean) / std, (raw - 0.5) / 0.5
    (first,), (second,), (got,) = a([x], [None]), b([y], [None]), both([x], [None])
    second_map = second.patches.transpose(1, 2).reshape(2, 48, 3, 4)  # patches of 16; the first has 6 x 8
    wide = F.interpolate(second_map, (6, 8), mode="bilinear", align_corners=False)
    want = torch.cat([first.patches, wide.flatten(2).transpose(1, 2)], dim=2)
    torch.testing.assert_close(got.patches, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.cls, torch.cat([first.cls, second.cls], dim=1), rtol=0, atol=1e-5)
    assert got.registers.shape[1] == 0
    assert (both.width, both.patch, both.input) == (80, 8, a.input)


@torch.no_grad()
def test_bilinear_places_against_two_loops(generator):
    """A map of 1 x 2 on a grid of 1 x 4: centres at 1/4, 3/4 of the width, read at 1/8, 3/8, 5/8, 7/8."""
    _, b, both = two()
    x = torch.randn(1, 3, 8, 32, generator=generator)  # 1 x 4 of the first; 16 x 32 for the second: 1 x 2
    shown = F.interpolate(x * both.scale1 + both.shift1, (16, 32), mode="bilinear", antialias=True)
    left, right = b([shown], [None])[0].patches[0]
    got = both([x], [None])[0].patches[0, :, 32:]
    for place, share in enumerate((0.0, 0.25, 0.75, 1.0)):
        torch.testing.assert_close(got[place], (1 - share) * left + share * right, rtol=0, atol=1e-5)


@torch.no_grad()
def test_blocks_are_counted_from_the_last(generator):
    a, b, both = two()
    assert len(both.blocks) == 2
    x = torch.randn(1, 3, 32, 32, generator=generator)
    before, last = last_layers(both, x, 2)
    y = x * both.scale1 + both.shift1
    want = torch.cat([a.layers(x, [1])[0].cls, b.layers(y, [0])[0].cls], dim=1)
    torch.testing.assert_close(before.cls, want)
    torch.testing.assert_close(last.cls, both([x], [None])[0].cls)


@torch.no_grad()
def test_a_file_has_both_and_gives_the_same_features(tmp_path, generator):
    _, _, both = two()
    section = {"name": "joined", "of": [VIT, TIMM], "channels": 3}
    save_backbone(tmp_path / "both.safetensors", both, section)
    back = load_backbone(tmp_path / "both.safetensors")
    x = torch.randn(1, 3, 32, 32, generator=generator)
    torch.testing.assert_close(back([x], [None])[0].patches, both([x], [None])[0].patches)
    assert fingerprint(back) == fingerprint(both)
    bad = {**section, "of": [VIT, {**TIMM, "pretrained": True}]}
    save_backbone(tmp_path / "bad.safetensors", both, bad)
    with pytest.raises(ValueError, match=r"bad\.safetensors names a model whose weights would be downloaded"):
        load_backbone(tmp_path / "bad.safetensors")


@torch.no_grad()
def test_each_part_may_have_a_file_and_a_folder_of_timm_is_one(tmp_path, generator):
    a, b, _ = two()
    save_backbone(tmp_path / "a.safetensors", a, VIT)
    net = timm.create_model("vit_base_patch16_siglip_224", num_classes=5, img_size=32, **SMALL)
    net.load_state_dict(b.net.state_dict(), strict=False)  # all but a classifier
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    shown = {"tag": "webli", "mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    config = {"architecture": "vit_base_patch16_siglip_224", "model_args": {**SMALL, "img_size": 32},
              "pretrained_cfg": shown}  # fmt: skip
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    folder = load_backbone(tmp_path / "b")
    x = torch.randn(1, 3, 32, 32, generator=generator)
    torch.testing.assert_close(folder([x], [None])[0].cls, b([x], [None])[0].cls)
    assert (folder.input.size, folder.model) == (64, "vit_base_patch16_siglip_224.webli")
    file = {**TIMM, "weights": str(tmp_path / "b" / "model.safetensors")}
    both = build_section({"name": "joined", "of": [{"weights": str(tmp_path / "a.safetensors")}, file]})
    torch.testing.assert_close(both([x], [None])[0].cls[:, :32], a([x], [None])[0].cls)
    torch.testing.assert_close(both.parts[1]([x], [None])[0].cls, b([x], [None])[0].cls)
    with pytest.raises(ValueError, match=r"config.json says vit_base_patch16_siglip_224, and .*=convnext_at"):
        build_section({"name": "timm_any", "model": "convnext_atto", "weights": str(tmp_path / "b")})
    out = tmp_path / "both.safetensors"
    models.run(Command(["join", str(tmp_path / "a.safetensors"), str(tmp_path / "b")], [f"out={out}"]))
    torch.testing.assert_close(load_backbone(out)([x], [None])[0].patches, both([x], [None])[0].patches)
    tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"net.norm.weight: asked for \(48,\), absent"):
        build_section({**TIMM, "weights": str(tmp_path / "short.safetensors")})


@torch.no_grad()
def test_heads_of_files_that_do_not_say_them_are_those_of_the_command(tmp_path, generator):
    a, _, _ = two()
    torch.save(a.state_dict(), tmp_path / "a.pth")
    out = tmp_path / "twice.safetensors"
    models.run(Command(["join", *[str(tmp_path / "a.pth")] * 2], ["heads=2", f"out={out}"]))
    x = torch.randn(1, 3, 32, 32, generator=generator)
    back = load_backbone(out)
    assert [part.heads for part in back.parts] == [2, 2]
    torch.testing.assert_close(back([x], [None])[0].cls[:, :32], a([x], [None])[0].cls)


def test_a_file_has_the_mean_of_its_images_and_the_size_where_none_is_given(tmp_path):
    a = two()[0]
    named = {**VIT, "weights": str(tmp_path / "a.safetensors")}
    a.input = Input(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_backbone(tmp_path / "a.safetensors", a, VIT)
    assert build_section(named).input == Input(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert build_section({**named, "size": 64}).input.size == 64
    named.pop("size")
    with pytest.raises(ValueError, match=r"backbone\.patch, backbone\.depth: without backbone\.name"):
        build_section({"patch": 8, "depth": 3, "weights": str(tmp_path / "a.safetensors")})
    assert build_section(named).input == a.input


def folder_of_timm(folder, net, **model_args):
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in net.state_dict().items()}, folder / "model.safetensors"
    )
    config = {"architecture": "vit_base_patch16_siglip_224", "model_args": model_args,
              "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_arguments_of_a_folder_of_timm_are_compared_and_bounded(tmp_path):
    net = timm.create_model("vit_base_patch16_siglip_224", num_classes=5, **SMALL)
    folder_of_timm(tmp_path / "good", net, **SMALL, num_classes=5)
    section = {"name": "timm_any", "model": "vit_base_patch16_siglip_224", "weights": str(tmp_path / "good")}
    assert build_section({**section, "args": SMALL}).input.size == 64
    # No tensor shows how many heads there are, so they would be other features.
    with pytest.raises(ValueError, match=r"model_args num_heads=3, and backbone\.args num_heads=6"):
        build_section({**section, "args": {**SMALL, "num_heads": 6}})
    folder_of_timm(tmp_path / "deep", net, **{**SMALL, "depth": 10**9})
    with pytest.raises(ValueError, match=r"depth=1000000000, and the file has \d+ tensors"):
        load_backbone(tmp_path / "deep")
    folder_of_timm(tmp_path / "wrong", net, **{**SMALL, "num_heads": 0})
    with pytest.raises(
        ValueError, match=r"vit_base_patch16_siglip_224 with args=.*'num_heads': 0.*ZeroDivision"
    ):
        load_backbone(tmp_path / "wrong")


def test_maps_are_resampled_in_32_bits(generator):
    """Encoders may give maps of 16 bits, which torch cannot resample with antialias on a CPU."""
    _, _, both = two()
    first = torch.randn(1, 16, 32, generator=generator).bfloat16()
    second = torch.randn(1, 4, 48, generator=generator).bfloat16()
    tokens = [Tokens(each[:, 0], each[:, :0], each) for each in (first, second)]
    got = both._join(tokens, torch.zeros(1, 3, 32, 32)).patches[0, :, 32:]
    wide = second.float().transpose(1, 2).reshape(1, 48, 2, 2)
    wide = F.interpolate(wide, (4, 4), mode="bilinear", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(got, wide, rtol=0, atol=1e-5)


def test_what_cannot_be_joined_or_trained_is_refused():
    a, b, both = two()
    with pytest.raises(ValueError, match="1 encoders: to join some, give two"):
        Joined([a])
    b.channels = 1
    with pytest.raises(ValueError, match="images of 3, 1 channels"):
        Joined([a, b])
    with pytest.raises(ValueError, match=r"a Joined \(joined is for frozen encoders"):
        list(export(both, "onnx", "unused.onnx"))
    with pytest.raises(ValueError, match=r"name=timm_any cannot be trained: .* as a timm_vit"):
        build_backbone(load_recipe("scenes_cpu", ["backbone.name=timm_any", f"backbone.model={TINY}"]))
    with pytest.raises(ValueError, match="masks are for training, and joined is for frozen"):
        both([torch.zeros(1, 3, 32, 32)], [torch.zeros(1, 16, dtype=torch.bool)])
