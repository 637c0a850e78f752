"""DINOv3's files: timm's and transformers' own models with random weights are the oracles."""

import json
from dataclasses import asdict
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from dinokit.models import Input
from dinokit.models import dinov3 as model
from dinokit.models.dinov3 import SIZES, Config, DINOv3
from dinokit.models.timm_convnext import TimmConvNeXt
from dinokit.weights import fill, load_backbone, save_backbone
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint
from dinokit.weights.formats import dinov3, export, huggingface_dinov3, timm_dinov3
from dinokit.weights.load import read

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IMAGES = ((32, 32), (48, 80), (96, 16))


def randomise(net: torch.nn.Module) -> None:
    """Weights far from their defaults: LayerScales of 1e-5 and biases of 0 would hide wrong wiring."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            std = 0.5 if p.ndim == 1 else 0.05
            p.copy_(around + std * torch.randn(p.shape, generator=generator))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    assert want.abs().max() > 1e-3
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


def compare(backbone, rows_of, theirs, grads_by_our_names) -> None:
    """Values at three sizes, and gradients of images and of every parameter."""
    generator = torch.Generator().manual_seed(1)
    backbone.requires_grad_(True)
    for height, width in IMAGES:
        x = torch.randn(2, 3, height, width, generator=generator)
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        tokens = backbone([ours_x], [None])[0]
        got, want = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), rows_of(theirs_x)
        close(got, want)
        weights = torch.randn(want.shape, generator=generator) / want.numel() ** 0.5
        for net in (backbone, theirs):
            net.zero_grad()
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        close(ours_x.grad, theirs_x.grad)
    grads = grads_by_our_names({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    ours = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    assert len(ours) > 20
    for name, grad in ours.items():
        close(grad, grads[name])


def timm_model(name: str, **values):
    return timm.create_model(name, num_classes=0, global_pool="token", **values).eval()


def check_timm(net, folder: Path) -> None:
    randomise(net)
    save_file(net.state_dict(), folder / "x.safetensors")
    heads = net.blocks[0].attn.num_heads
    backbone = load_backbone(folder / "x.safetensors", heads=heads)

    def named(grads):
        return timm_dinov3.read(Checkpoint(Path("x"), grads), heads).tensors

    compare(backbone, net.forward_features, net, named)


def check_transformers(folder: Path, **values) -> None:
    net = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**values)).eval()
    randomise(net)
    net.save_pretrained(folder)
    backbone = load_backbone(folder)
    config = json.loads((folder / "config.json").read_text())

    def named(grads):
        return huggingface_dinov3.read(Checkpoint(Path("x"), grads, config=config), None).tensors

    compare(backbone, lambda x: net(x).last_hidden_state, net, named)


SMALL = {"embed_dim": 128, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("vit_small_patch16_dinov3_qkvb", SMALL),
        ("vit_small_patch16_dinov3", {**SMALL, "num_heads": 4}),
        ("vit_small_plus_patch16_dinov3_qkvb", SMALL),
        ("vit_7b_patch16_dinov3", {**SMALL, "num_heads": 1}),
    ],
)
def test_a_model_of_timm_gives_the_same(name, values, tmp_path):
    check_timm(timm_model(name, **values), tmp_path)


TRANSFORMERS = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
}
GATED = {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 320}
NO_BIAS = {"query_bias": False, "value_bias": False}


@pytest.mark.parametrize(
    "values", [{}, GATED, {**GATED, **NO_BIAS}, {"num_register_tokens": 0, "rope_theta": 50.0}]
)
def test_a_model_of_transformers_gives_the_same(values, tmp_path):
    check_transformers(tmp_path, **{**TRANSFORMERS, **values})


@pytest.mark.parametrize(
    ("given", "side", "why"),
    [
        ({}, 224, "224 pixels, as image_size in config.json says"),
        ({"image_size": 160}, 160, "160 pixels, as image_size in config.json says"),
        ({"image_size": [160, 160]}, 160, "160 pixels, as image_size in config.json says"),
        ({"image_size": None}, 224, "224 pixels, to which DINOv3's image processor of transformers resizes"),
        ({"image_size": [160, 320]}, 224, "224 pixels, to which DINOv3's image processor"),
        ({"image_size": [[1], 2]}, 224, "224 pixels, to which DINOv3's image processor"),
    ],
)
def test_without_a_file_about_images_their_size_is_that_of_the_config_or_of_transformers(
    given, side, why, tmp_path
):
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TRANSFORMERS)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **given}))
    _, stored = read(tmp_path)
    assert (stored.input.size, stored.section["size"]) == (side, side)
    assert [note for note in stored.notes if "preprocessor_config.json" in note and why in note]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 96, "width": 96}}))
    _, stored = read(tmp_path)
    assert stored.input.size == 96
    assert not [note for note in stored.notes if "preprocessor_config.json" in note]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_the_released_shapes_are_those_of_both_libraries(name, tmp_path):
    """Two blocks of every released width; one of the 7B's, whose weights are there four times."""
    size, depth = SIZES[name], 1 if name == "vit7b16" else 2
    gated = {"use_gated_mlp": True, "hidden_act": "silu"} if "hidden" in size else {}
    check_transformers(
        tmp_path, hidden_size=size["width"], num_hidden_layers=depth, num_attention_heads=size["heads"],
        intermediate_size=size.get("hidden", 4 * size["width"]), num_register_tokens=4, **gated,
        **(NO_BIAS if "qkv_bias" in size else {}),
    )  # fmt: skip
    word = {"s": "small", "b": "base", "l": "large", "h": "huge", "7": "7b"}[name[3]]
    word += "_plus" if name.endswith("plus") else ""
    known = [f"vit_{word}_patch16_dinov3{end}" for end in ("", "_qkvb")]
    for timm_name in [known for known in known if known in timm.list_models("*dinov3*")]:
        check_timm(timm_model(timm_name, depth=depth), tmp_path)


def official_keys(width: int, hidden: int, quarter: int, blocks: int, gated: bool, biased: bool, local: bool):
    """The table of section 8.2: names and shapes of a released file."""
    keys = {
        "cls_token": (1, 1, width), "storage_tokens": (1, 4, width), "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "rope_embed.periods": (quarter,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    if local:
        keys |= {"local_cls_norm.weight": (width,), "local_cls_norm.bias": (width,)}
    for i in range(blocks):
        block = {f"norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        block |= {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width)}
        block |= {"attn.proj.bias": (width,), "ls1.gamma": (width,), "ls2.gamma": (width,)}
        if biased:
            block |= {"attn.qkv.bias": (3 * width,), "attn.qkv.bias_mask": (3 * width,)}
        first, last = (("w1", "w2"), "w3") if gated else (("fc1",), "fc2")
        for name in first:
            block |= {f"mlp.{name}.weight": (hidden, width), f"mlp.{name}.bias": (hidden,)}
        block |= {f"mlp.{last}.weight": (width, hidden), f"mlp.{last}.bias": (width,)}
        keys |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return keys


@pytest.mark.parametrize("name", SIZES)
def test_a_released_file_is_identified_and_fits(name, tmp_path):
    size = SIZES[name]
    biased = "qkv_bias" not in size
    keys = official_keys(
        size["width"], size.get("hidden", 4 * size["width"]), size["width"] // size["heads"] // 4,
        size["depth"], "hidden" in size, biased, not biased,
    )  # fmt: skip
    tensors = {key: torch.zeros((), dtype=torch.uint8).expand(shape) for key, shape in keys.items()}
    stored = dinov3.read(Checkpoint(Path("x"), {k: t.to("meta") for k, t in tensors.items()}), None)
    section = dict(stored.section)
    assert section.pop("name") == "dinov3"
    with torch.device("meta"):
        vit = DINOv3(Config(**section))
    assert {key: tuple(t.shape) for key, t in vit.state_dict().items()} == keys
    assert vit.heads == size["heads"]
    assert (stored.licence, stored.input.size) == ("DINOv3 License", 256)


def drawn(**values) -> DINOv3:
    torch.manual_seed(0)
    vit = DINOv3(Config(**{"width": 128, "depth": 2, "heads": 2, "size": 64, **values})).eval()
    randomise(vit)
    vit.input = Input(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return vit


def features(backbone, height=48, width=80):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        tokens = backbone([x], [None])[0]
    return torch.cat([tokens.cls[:, None], tokens.patches], 1)


def official_file(vit: DINOv3, path: Path, **changes) -> Path:
    tensors = {name: value.clone() for name, value in vit.state_dict().items()}
    torch.save({**tensors, **changes}, path)
    return path


def test_the_periods_are_computed_or_taken_from_the_file(tmp_path):
    vit = drawn()
    rounded = vit.rope_embed.periods.bfloat16().float()
    path = official_file(vit, tmp_path / "x.pth", **{"rope_embed.periods": rounded})
    assert torch.equal(features(load_backbone(path)), features(vit))
    as_stored = load_backbone(path, stored_periods=True)
    vit.rope_embed.periods.copy_(rounded)
    assert torch.equal(features(as_stored), features(vit))
    assert not torch.equal(features(as_stored), features(load_backbone(path)))
    save_backbone(tmp_path / "ours.safetensors", vit, {"name": "dinov3", **asdict(vit.config)})
    with pytest.raises(ValueError, match=r"ours\.safetensors \(dinokit \S+\) has no periods"):
        load_backbone(tmp_path / "ours.safetensors", stored_periods=True)
    other = official_file(vit, tmp_path / "y.pth", **{"rope_embed.periods": model.periods(64, 1000.0)})
    assert torch.equal(load_backbone(other).rope_embed.periods, model.periods(64, 1000.0))


def test_biases_of_keys_and_masks_without_values_do_no_harm(tmp_path):
    vit = drawn()
    bias = vit.blocks[0].attn.qkv.bias.detach().clone()
    bias[128:256] = 7.0
    nothing = torch.full((3 * 128,), float("nan"))
    changes = {"blocks.0.attn.qkv.bias": bias, "blocks.0.attn.qkv.bias_mask": nothing}
    loaded = load_backbone(official_file(vit, tmp_path / "x.pth", **changes))
    assert torch.equal(features(loaded), features(vit))
    assert not loaded.blocks[0].attn.qkv.bias[128:256].any()


def test_a_checkpoint_of_training_gives_the_teachers_backbone(tmp_path):
    vit = drawn(untied_local_norm=True, ffn="swiglu")
    tensors = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    heads = {f"{head}.mlp.0.weight": torch.ones(4, 4) for head in ("dino_head", "ibot_head")}
    torch.save({"teacher": {**tensors, **heads}}, tmp_path / "x.pth")
    assert torch.equal(features(load_backbone(tmp_path / "x.pth")), features(vit))
    stored = read(tmp_path / "x.pth")[1]
    assert stored.ignored == ["dino_head (1 tensors)", "ibot_head (1 tensors)"]
    assert "training dump" in stored.format


def test_the_satellite_model_is_known_by_its_keys(tmp_path):
    keys = official_keys(1024, 4096, 16, 1, gated=False, biased=True, local=True)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    stored = dinov3.read(Checkpoint(tmp_path / "renamed.pth", tensors), None)
    assert (stored.input.mean, stored.input.std) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    assert "satellite" in stored.format


@pytest.mark.parametrize("layout", ["dinov3", "timm", "hf"])
def test_a_partial_file_is_refused_with_the_missing_tensor(layout, tmp_path):
    out = tmp_path / ("x.pth" if layout == "dinov3" else "x")
    list(export(drawn(), layout, out))
    file = open_checkpoint(out)
    name = next(n for n in file.tensors if "norm2.weight" in n and "1." in n)
    del file.tensors[name]
    path = out if layout == "dinov3" else out / "model.safetensors"
    (tmp_path / "x" / "checksums.json").unlink(missing_ok=True)  # as if it came from elsewhere
    (torch.save if layout == "dinov3" else save_file)({n: t.clone() for n, t in file.tensors.items()}, path)
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2\.weight: asked for \(128,\), absent"):
        load_backbone(out, heads=2)
    assert load_backbone(out, heads=2, partial=True).blocks[1].norm2.weight.shape == (128,)


def test_files_of_others_are_refused_by_name_or_named(tmp_path):
    vit = drawn()
    tensors = {name.replace("attn.qkv", "attn.wq"): t for name, t in vit.state_dict().items()}
    torch.save(tensors, tmp_path / "sapiens.pth")
    with pytest.raises(ValueError, match="a Sapiens2"):
        load_backbone(tmp_path / "sapiens.pth")
    path = official_file(vit, tmp_path / "eupe.pth", **{"projectors.0.weight": torch.ones(2, 2)})
    stored = read(path)[1]
    assert stored.ignored == ["projectors (1 tensors)"]
    assert any("EUPE" in note for note in stored.notes)
    half = official_file(vit, tmp_path / "half.pth", **{"cls_token": torch.zeros(1, 1, 64)})
    with pytest.raises(ValueError, match=r"cls_token: asked for \(1, 1, 128\), found \(1, 1, 64\)"):
        load_backbone(half, heads=2)


@pytest.mark.parametrize("values", [{}, {"ffn": "swiglu", "untied_local_norm": True}, {"qkv_bias": "none"}])
def test_from_format_to_format_and_back_nothing_changes(values, tmp_path):
    vit = drawn(**values, rope_base=70.0)
    want = features(vit)
    route = [("timm", "b"), ("hf", "c"), ("timm", "d.safetensors"), ("hf", "e")]
    source = vit
    for to, out in route:
        lines = list(export(source, to, tmp_path / out))
        assert any(line.startswith("Largest difference at 64 x 64") for line in lines)
        source = load_backbone(tmp_path / out)
        close(features(source), want)
        assert source.input == vit.input
        assert source.config.rope_base == 70.0
    save_backbone(tmp_path / "f.safetensors", source, {"name": "dinov3", **vars(source.config)})
    assert torch.equal(features(load_backbone(tmp_path / "f.safetensors")), features(source))


def test_the_licence_travels_with_the_weights(tmp_path):
    vit = load_backbone(official_file(drawn(), tmp_path / "x.pth"))
    assert vit.licence == "DINOv3 License"
    list(export(vit, "timm", tmp_path / "timm"))
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["license"]
    again = load_backbone(tmp_path / "timm")
    save_backbone(tmp_path / "y.safetensors", again, {"name": "dinov3", **vars(again.config)})
    assert load_backbone(tmp_path / "y.safetensors").licence == "DINOv3 License"
    list(export(drawn(), "hf", tmp_path / "ours"))  # weights of our own have none
    assert load_backbone(tmp_path / "ours").licence == ""


def test_fill_takes_the_same_files(tmp_path):
    vit, other = drawn(), drawn(rope_rescale=1.0)
    with torch.no_grad():
        other.norm.weight.zero_()
    list(export(vit, "timm", tmp_path / "x.safetensors"))
    fill(other, tmp_path / "x.safetensors", tolerate=["mask_token"])
    close(features(other), features(vit))
    with pytest.raises(ValueError, match="heads: asked for 4, found 2"):
        fill(drawn(heads=4), tmp_path / "x.safetensors", tolerate=["*"])


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"timm has no DINOv3 with backbone\.rope_sides=max"):
        list(export(drawn(rope_sides="max"), "timm", tmp_path / "x"))
    with pytest.raises(ValueError, match="with to=timm and to=hf and to=dinov3 and to=onnx, not dinov2"):
        list(export(drawn(), "dinov2", tmp_path / "x.pth"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"registers": 0, "ffn": "swiglu", "qkv_bias": "none", "untied_cls_norm": True, "rope_sides": "max"},
        {"rope_sides": "min", "layer_scale": 0.0},
    ],
)
def test_one_graph_takes_images_of_any_size(values, tmp_path):
    vit = drawn(**values)
    list(export(vit, "onnx", tmp_path / "x.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for number, (h, w) in enumerate(IMAGES, 1):
        x = torch.randn(number, 3, h, w, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            tokens = vit([x], [None])[0]
        found = session.run(None, {"images": x.numpy()})
        for got, want in zip(map(torch.from_numpy, found), (tokens.cls, tokens.patches), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    """A ConvNeXt of transformers with random weights, its folder, and our backbone of it."""
    folder = tmp_path_factory.mktemp("convnext")
    net = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    net.save_pretrained(folder)
    return net, folder, load_backbone(folder)


def test_a_convnext_of_transformers_gives_the_same(convnext):
    net, _, backbone = convnext
    for height, width in ((64, 64), (32, 96), (96, 64)):
        x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        tokens = backbone([ours_x], [None])[0]
        got, want = torch.cat([tokens.cls[:, None], tokens.patches], 1), net(theirs_x).last_hidden_state
        close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        close(ours_x.grad, theirs_x.grad)


@pytest.mark.slow
def test_a_convnext_goes_through_all_layouts(convnext, tmp_path):
    _, _, backbone = convnext
    want = features(backbone, 64, 64)
    for to, out in (("timm", "a"), ("timm", "b.safetensors"), ("hf", "c")):
        list(export(backbone, to, tmp_path / out))
        close(features(load_backbone(tmp_path / out), 64, 64), want)
    official = {}
    for name, value in load_file(tmp_path / "b.safetensors").items():  # by the table of section 8.4
        name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
        if ".downsample." in name:
            stage, rest = name.split(".")[1], name.split(".downsample.")[1]
            name = f"downsample_layers.{stage}.{rest}"
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        official[name] = value
    official |= {f"norms.3.{kind}": official[f"norm.{kind}"].clone() for kind in ("weight", "bias")}
    assert len(official) == 182
    torch.save(official, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth")
    assert isinstance(loaded, TimmConvNeXt)
    assert torch.equal(features(loaded, 64, 64), features(load_backbone(tmp_path / "b.safetensors"), 64, 64))
    del official["stages.2.4.gamma"]
    torch.save(official, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"net\.stages\.2\.blocks\.4\.gamma: asked for"):
        load_backbone(tmp_path / "x.pth")
    del official["downsample_layers.0.0.weight"]
    torch.save(official, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="contains no backbone that dinokit knows"):
        load_backbone(tmp_path / "x.pth")
