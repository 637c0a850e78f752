"""Exported backbones give the same features in timm, transformers and onnxruntime."""

import json
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from dinokit.data.transforms import center_crop
from dinokit.models import Input
from dinokit.models.pixels import Config as PixelsConfig
from dinokit.models.pixels import Pixels
from dinokit.models.vit import interpolate_grid
from dinokit.weights import load_backbone, save_backbone
from dinokit.weights.formats import export, section_of
from dinokit.weights.formats.onnx import Positions

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
CLOSE = {"rtol": 0, "atol": 1e-5}


def features_of(backbone, x):
    tokens = backbone([x], [None])[0]
    return tokens.cls, tokens.patches


def write(backbone, to, out, **more):
    return list(export(backbone, to, out, **more))


def test_from_format_to_format_and_back_nothing_changes(architecture, drawn, tmp_path):
    vit = drawn(**architecture)
    vit.input = Input(56, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    route = [("dinov2", "a.pth"), ("timm", "b"), ("hf", "c"), ("timm", "d.safetensors"), ("dinov2", "e.pth")]
    write(vit, *route[0][:1], tmp_path / route[0][1])
    for (_, source), (to, out) in pairwise(route):
        write(load_backbone(tmp_path / source), to, tmp_path / out)
    for side in (
        vit.side,
        vit.side + 2,
    ):  # away from the stored grid its resampling must have come through, too
        x = torch.randn(2, 3, side * vit.patch, side * vit.patch)
        for _, out in route:
            for have, want in zip(
                features_of(load_backbone(tmp_path / out), x), features_of(vit, x), strict=True
            ):
                torch.testing.assert_close(have, want, **CLOSE)


def test_timm_opens_the_exported_folder(architecture, drawn, tmp_path):
    vit = drawn(**architecture)
    lines = write(vit, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, vit.side * vit.patch, vit.side * vit.patch)
    cls, patches = features_of(vit, x)
    rows = model.forward_features(x)
    torch.testing.assert_close(rows[:, 0], cls, **CLOSE)
    torch.testing.assert_close(rows[:, 1 + vit.registers :], patches, **CLOSE)
    torch.testing.assert_close(model(x), cls, **CLOSE)  # without a classifier it gives the class token
    assert tuple(timm.data.resolve_model_data_config(model)["mean"]) == vit.input.mean
    assert any(line.startswith(f"Largest difference at {vit.side * vit.patch} x") for line in lines)


def test_transformers_opens_the_exported_folder(architecture, drawn, tmp_path):
    vit = drawn(**architecture)
    vit.input = Input(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    write(vit, "hf", tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    x = torch.randn(2, 3, vit.side * vit.patch, vit.side * vit.patch)
    cls, patches = features_of(vit, x)
    out = model(x)
    torch.testing.assert_close(out.pooler_output, cls, **CLOSE)
    torch.testing.assert_close(out.last_hidden_state[:, 1 + vit.registers :], patches, **CLOSE)
    picture = np.full((70, 60, 3), 51, np.uint8)  # 0.2 of white
    shown = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")(picture, return_tensors="pt")
    assert shown.pixel_values.shape == (1, 3, 56, 56)
    want = (0.2 - torch.tensor(vit.input.mean)) / torch.tensor(vit.input.std)
    torch.testing.assert_close(shown.pixel_values[0, :, 5, 5], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "earlier"), [(96, 128, 0), (96, 143, 1), (143, 96, 1)])
def test_the_image_processor_of_the_folder_makes_the_pixels_of_dinokit(
    height, width, earlier, drawn, tmp_path
):
    """Where half a pixel is to be rounded, it cuts a row or column earlier than torchvision's CenterCrop."""
    vit = drawn()
    vit.input = Input(56, (0.0,) * 3, (1.0,) * 3)
    write(vit, "hf", tmp_path / "out")
    small = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = torch.as_tensor(processor(picture, return_tensors="pt").pixel_values[0]) * 255
    ours = center_crop(picture, 64, 56).float()
    down, right = (earlier, 0) if height > width else (0, earlier)
    ours, theirs = ours[:, : 56 - down, : 56 - right], theirs[:, down:, right:]
    assert (ours - theirs).abs().max() < 2.5  # with torchvision 0, with Pillow 2


def test_the_official_layout_is_a_flat_dict_that_torch_reads_without_code(drawn, tmp_path):
    vit = drawn(heads=4)
    lines = write(vit, "dinov2", tmp_path / "x.pth")
    saved = torch.load(tmp_path / "x.pth", weights_only=True)
    assert set(saved) == set(vit.state_dict())
    assert any("load_backbone needs heads=4" in line for line in lines)


def test_a_single_file_for_timm_loads_into_the_named_model(drawn, tmp_path):
    write(drawn(), "timm", tmp_path / "x.safetensors")
    like = {"img_size": 56, "embed_dim": 128, "num_heads": 2, "depth": 2, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_dinov2", **like)
    model.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)


def test_the_difference_by_resampled_positions_is_reported(drawn, tmp_path):
    lines = write(drawn(), "hf", tmp_path / "out")
    assert any("resampled, by another rule" in line for line in lines)
    same = write(drawn(pos_offset=0.0), "hf", tmp_path / "same")  # as transformers does it
    assert not any("resampled" in line for line in same)


def bytes_in(place):
    return {path: path.read_bytes() for path in sorted([place, *place.rglob("*")]) if path.is_file()}


@pytest.mark.parametrize("to", ["dinov2", "hf", "timm", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_wrong_export_does_not_replace_a_correct_one(drawn, tmp_path, to):
    vit = drawn()
    write(vit, to, tmp_path / "out")
    good = bytes_in(tmp_path / "out")
    vit.blocks[0].norm1.weight.data[0] = float("nan")
    for _ in range(2):  # the second finds the first one's there
        with pytest.raises(ValueError, match=r"difference at .*: nan .*It lies in .*out\.wrong"):
            write(vit, to, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.wrong"]
        assert bytes_in(tmp_path / "out") == good


@pytest.mark.slow
def test_a_vit_with_a_stem_of_convolutions_is_exported_to_onnx_alone(drawn, tmp_path):
    vit = drawn(stem="conv", patch=8, size=64, pos_offset=0.0)
    write(vit, "onnx", tmp_path / "x.onnx")
    x = torch.randn(2, 3, 48, 64)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for have, want in zip(session.run(None, {"images": x.numpy()}), features_of(vit, x), strict=True):
        torch.testing.assert_close(torch.from_numpy(have), want, rtol=0, atol=1e-4)
    save_backbone(tmp_path / "ours.safetensors", vit, section_of(vit))
    again = load_backbone(tmp_path / "ours.safetensors")
    torch.testing.assert_close(features_of(again, x)[0], features_of(vit, x)[0], rtol=0, atol=0)
    for to in ("timm", "hf", "dinov2"):
        with pytest.raises(ValueError, match=f"No model of to={to} has convolutions"):
            write(vit, to, tmp_path / "no")


@pytest.mark.slow
def test_a_graph_with_a_separate_weights_file_opens(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("dinokit.weights.formats.onnx.MAX_BYTES", 1000)
    vit = drawn()
    write(vit, "onnx", tmp_path / "x.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    x = torch.randn(1, 3, 56, 56)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    cls, _ = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(cls), features_of(vit, x)[0], rtol=0, atol=1e-4)


def test_only_a_vit_is_exported(tmp_path):
    with pytest.raises(ValueError, match=r"A `vit`, .* can be exported, .* is a Pixels"):
        write(Pixels(PixelsConfig()), "timm", tmp_path / "out")


def test_one_channel_is_exported_with_a_note(drawn, tmp_path):
    vit = drawn(channels=1)
    lines = write(vit, "hf", tmp_path / "hf")
    assert any("AutoImageProcessor makes RGB" in line for line in lines)
    write(vit, "timm", tmp_path / "timm")
    x = torch.randn(1, 1, 56, 56)
    for out in ("hf", "timm"):
        torch.testing.assert_close(
            features_of(load_backbone(tmp_path / out), x)[0], features_of(vit, x)[0], **CLOSE
        )


@pytest.mark.parametrize(("offset", "antialias"), [(0.1, False), (0.0, True), (0.0, False)])
@pytest.mark.parametrize(("h", "w"), [(7, 7), (5, 9), (14, 3), (1, 20)])
def test_the_matrices_of_a_graph_equal_bicubic_resampling(drawn, offset, antialias, h, w):
    vit = drawn(size=98, pos_offset=offset, pos_antialias=antialias)
    grid = vit.pos_embed[:, 1:].unflatten(1, (7, 7))
    want = grid if (h, w) == (7, 7) else interpolate_grid(grid, h, w, offset, antialias)
    torch.testing.assert_close(Positions(vit)(torch.arange(h), torch.arange(w)), want[0], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [{}, {"registers": 4, "pos_offset": 0.0, "pos_antialias": True, "ffn": "swiglu"}]
)
def test_one_graph_takes_images_of_any_size(drawn, tmp_path, values):
    vit = drawn(width=64, heads=1, depth=1, **values)
    lines = write(vit, "onnx", tmp_path / "any.onnx")
    assert sum(line.startswith("Largest difference") for line in lines) == 2
    session = onnxruntime.InferenceSession(tmp_path / "any.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["cls", "patches"]
    for shape in ((1, 3, 56, 56), (3, 3, 28, 84), (2, 3, 112, 98)):
        x = torch.randn(shape)
        for have, want in zip(session.run(None, {"images": x.numpy()}), features_of(vit, x), strict=True):
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-4)
    about = {p.key: p.value for p in onnx.load(tmp_path / "any.onnx").metadata_props}
    assert json.loads(about["dinokit_input"])["size"] == 56


@pytest.mark.slow
def test_a_graph_of_one_size_takes_any_number_of_images(drawn, tmp_path):
    vit = drawn(width=64, heads=1, depth=1)
    write(vit, "onnx", tmp_path / "fixed.onnx", size=28)
    session = onnxruntime.InferenceSession(tmp_path / "fixed.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 28, 28]
    for images in (1, 5):
        x = torch.randn(images, 3, 28, 28)
        for have, want in zip(session.run(None, {"images": x.numpy()}), features_of(vit, x), strict=True):
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="size=30 is not a multiple of the backbone's patch"):
        write(vit, "onnx", tmp_path / "x.onnx", size=30)
