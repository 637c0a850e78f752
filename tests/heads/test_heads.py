"""The heads: their published shapes, another library's DPT, and files in the released layout."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, DPTConfig, DPTForDepthEstimation

from dinokit.config import registry
from dinokit.features import Map
from dinokit.heads import DPT, LinearDepth, LinearSegmenter
from dinokit.heads.released import (
    load_depther,
    load_segmenter,
    released_model,
    save_head,
)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    sizes = {"width": 48, "depth": 12, "heads": 2, "patch": 14, "size": 28}
    return registry.build("models", {"name": "vit", "layer_scale": 1.0, **sizes}).eval()


def maps(count, width=48, grid=(4, 6)):
    return [Map(torch.randn(2, width, *grid), torch.randn(2, width)) for _ in range(count)]


@pytest.mark.parametrize("layers", [1, 4])
def test_the_linear_depth_head_equals_its_definition(layers):
    torch.manual_seed(0)
    head, given = LinearDepth(48, layers, 0.001, 10.0), maps(layers)
    assert head.conv_depth.weight.shape == (256, 2 * layers * 48, 1, 1)
    parts = [
        F.interpolate(
            torch.cat([m.patches, m.cls[:, :, None, None].expand_as(m.patches)], 1),
            scale_factor=4,
            mode="bilinear",
        )
        for m in given
    ]  # the published order: first the size, then the layer
    p = F.conv2d(torch.cat(parts, 1), head.conv_depth.weight, head.conv_depth.bias).clamp_min(0) + 0.1
    p = p / p.sum(1, keepdim=True)
    want = torch.einsum("bchw,c->bhw", p, torch.linspace(0.001, 10, 256))[:, None]
    got = head(given)
    assert got.shape == (2, 1, 16, 24)
    assert torch.allclose(got, want, atol=1e-4)


# DINOv2's hub code takes the width // 8, 4, 2 and 1 for the channels, whatever the width.
@pytest.mark.parametrize(("width", "channels"), [(48, [6, 12, 24, 48]), (50, [6, 12, 25, 50])])
def test_dpt_equals_the_one_of_transformers(width, channels):
    torch.manual_seed(0)
    inside = Dinov2Config(
        hidden_size=width, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    theirs = DPTForDepthEstimation(
        DPTConfig(
            backbone_config=inside, use_pretrained_backbone=False, is_hybrid=False, readout_type="project",
            reassemble_factors=[4, 2, 1, 0.5], neck_hidden_sizes=channels, fusion_hidden_size=256,
            use_batch_norm_in_fusion_residual=False, use_bias_in_fusion_residual=False, add_projection=True,
            head_in_index=-1,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():  # as they are made, nearly nothing comes through
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=fan**-0.5)
    torch.nn.init.ones_(theirs.head.head[4].bias)
    ours = DPT(width, 0.001, 10.0).eval()
    names = {key: _renamed(key) for key in theirs.state_dict() if "backbone" not in key}
    ours.load_state_dict({names[k]: v for k, v in theirs.state_dict().items() if names.get(k)})
    given = maps(4, width)
    tokens = [torch.cat([m.cls[:, None], m.patches.flatten(2).transpose(1, 2)], 1) for m in given]
    with torch.no_grad():
        want = theirs.head(theirs.neck(tokens, 4, 6))[:, None]
        got = ours(given)
    assert got.shape == (2, 1, 64, 96)
    assert want.std() > 0.1
    assert torch.allclose(got - 0.001, want, atol=1e-4 * want.max().item())


def _renamed(key):
    """From transformers' names to those of the released files."""
    if "fusion_stage.layers.0.residual_layer1" in key:
        return ""  # the first fusion adds nothing; transformers has a unit that it never calls
    for old, new in (
        ("neck.reassemble_stage.readout_projects.", "reassemble_blocks.readout_projects."),
        ("neck.reassemble_stage.layers.", "reassemble_blocks."),
        ("neck.convs.", "convs."),
        ("neck.fusion_stage.layers.", "fusion_blocks."),
        ("head.projection.", "project.conv."),
        ("head.head.", "conv_depth.head."),
        (".projection.", ".project.conv."),
        ("residual_layer", "res_conv_unit"),
        ("convolution1", "conv1.conv"),
        ("convolution2", "conv2.conv"),
    ):
        key = key.replace(old, new)
    parts = key.split(".")
    if parts[0] == "reassemble_blocks" and parts[1].isdigit():
        what = {"project": "projects", "resize": "resize_layers"}[parts[2]]
        rest = parts[3:] if parts[2] == "resize" else ["conv", parts[-1]]
        key = ".".join(["reassemble_blocks", what, parts[1], *rest])
    if parts[0] == "convs":
        key = f"convs.{parts[1]}.conv.{parts[2]}"
    return key


def test_dpt_refuses_a_width_that_leaves_a_map_without_channels():
    with pytest.raises(ValueError, match="8 or more, and this one's is 7"):
        DPT(7, 0.001, 10.0)


def test_a_dpt_head_for_a_small_model_has_the_released_number_of_parameters():
    # Counted from the layers of section 7.5: reassembly, four 3 x 3, fusion, projection, and the last three.
    d, f = 384, 256
    c = [d // 8, d // 4, d // 2, d]
    want = sum(2 * d * d + d + d * n + n + n * f * 9 for n in c)
    want += 16 * c[0] ** 2 + c[0] + 4 * c[1] ** 2 + c[1] + 9 * c[3] ** 2 + c[3]
    want += 7 * 2 * 9 * f * f + 4 * (f * f + f) + 9 * f * f + f
    want += 9 * f * f // 2 + f // 2 + 9 * 32 * f // 2 + 32 + 32 + 1
    assert sum(p.numel() for p in DPT(d, 0.001, 10.0).parameters()) == want


@pytest.mark.parametrize(
    ("kind", "blocks"), [("linear", [11]), ("linear4", [2, 5, 8, 11]), ("dpt", [2, 5, 8, 11])]
)
def test_the_kind_of_a_depth_head_is_inferred_from_its_file(tmp_path, vit, kind, blocks):
    layers = 1 if kind == "linear" else 4
    head = DPT(48, 0.001, 10.0, 16) if kind == "dpt" else LinearDepth(48, layers, 0.001, 10.0)
    save_head(tmp_path / "h.pth", head)
    model = load_depther(tmp_path / "h.pth", vit, "NYU")
    assert model.blocks == blocks
    images = torch.rand(2, 3, 40, 52)
    depth = model(images)
    assert depth.shape == (2, 1, 40, 52)
    parts = vit.get_intermediate_layers(
        F.pad((images - 0.5) / 0.5, (2, 2, 1, 1)), blocks, reshape=True, return_class_token=True, norm=False
    )
    want = head.eval()([Map(p, c) for p, c in parts]).clamp(0.001, 10)
    assert torch.allclose(depth, F.interpolate(want, (40, 52), mode="bilinear"), atol=1e-4)


def test_the_range_of_a_linear_head_is_that_of_its_training_set(tmp_path, vit):
    save_head(tmp_path / "h.pth", LinearDepth(48, 1, 0.001, 10.0))
    ranges = {
        "NYU": load_depther(tmp_path / "h.pth", vit, "NYU").head.max_depth,
        "KITTI": load_depther(tmp_path / "h.pth", vit, "KITTI").head.max_depth,
        "as the hub had it": load_depther(tmp_path / "h.pth", vit, "NYU", hub_range_bug=True).head.max_depth,
    }
    assert ranges == {"NYU": 10.0, "KITTI": 80.0, "as the hub had it": 80.0}
    images = torch.rand(1, 3, 28, 28)
    right, wrong = (load_depther(tmp_path / "h.pth", vit, hub_range_bug=bug)(images) for bug in (False, True))
    assert (wrong / right).median().item() == pytest.approx(8, rel=0.02)


def test_segmentation_heads_are_read_from_the_released_layout(tmp_path, vit):
    for count in (1, 4):
        head = LinearSegmenter(count * 48, 21)
        save_head(tmp_path / "s.pth", head)
        got, blocks = load_segmenter(tmp_path / "s.pth", vit)
        assert torch.equal(got.conv_seg.weight, head.conv_seg.weight)
        assert blocks == list(range(12 - count, 12))


def test_equal_heads_are_equal_files_under_any_name(tmp_path):
    head = LinearSegmenter(48, 5)
    for name in ("a.pth", "b.pth"):
        save_head(tmp_path / name, head)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_files_that_do_not_fit_and_files_that_are_no_head_are_refused(tmp_path, vit):
    save_head(tmp_path / "wide.pth", LinearDepth(64, 1, 0.001, 10.0))
    with pytest.raises(ValueError, match="is not a depth head on a backbone 48 wide"):
        load_depther(tmp_path / "wide.pth", vit)
    save_head(tmp_path / "seg.pth", LinearSegmenter(48, 5))
    with pytest.raises(ValueError, match=r"another kind of head: it has no project"):
        load_depther(tmp_path / "seg.pth", vit)
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"broken.pth .*cannot be read"):
        load_segmenter(tmp_path / "broken.pth", vit)
    with pytest.raises(LookupError, match="There is no file"):
        load_segmenter(tmp_path / "gone.pth", vit)
    with pytest.raises(ValueError, match="NYU and KITTI"):
        load_depther(tmp_path / "wide.pth", vit, "SUN")


@pytest.mark.parametrize(
    ("kind", "layers", "file"),
    [
        ("ld", 1, "dinov2_vits14/dinov2_vits14_kitti_linear_head.pth"),
        ("ld", 4, "dinov2_vits14/dinov2_vits14_kitti_linear4_head.pth"),
        ("dd", 4, "dinov2_vits14/dinov2_vits14_kitti_dpt_head.pth"),
    ],
)
def test_the_hubs_depth_models_come_from_the_released_files(tmp_path, vit, kind, layers, file):
    asked = []

    def fetch(path):
        asked.append(path)
        head = DPT(48, 0.001, 80.0, 16) if kind == "dd" else LinearDepth(48, layers, 0.001, 80.0)
        save_head(tmp_path / "h.pth", head)
        return tmp_path / "h.pth"

    model = released_model(vit, "dinov2_vits14", kind, fetch, layers, "KITTI")
    assert asked == [file]
    assert model.head.max_depth == 80.0
    assert model(torch.rand(1, 3, 30, 30)).shape == (1, 1, 30, 30)
    with pytest.raises(ValueError, match="models with registers have none"):
        released_model(vit, "dinov2_vits14_reg", kind, fetch)
    for other, count in {("ld", 1), ("ld", 4), ("dd", 4)} - {(kind, layers)}:
        there = "dinov2_vits14_dd" if kind == "dd" else f"dinov2_vits14_ld with layers={layers}"
        with pytest.raises(ValueError, match=rf"is not the head of .*, but of {there}\. Call that"):
            released_model(vit, "dinov2_vits14", other, fetch, count)
