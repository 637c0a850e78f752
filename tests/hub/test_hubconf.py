"""Entry points of torch.hub, used from a folder where dinokit is not installed, with torch only."""

import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dinokit.features import dense
from dinokit.heads import DPT, LinearDepth, to_size
from dinokit.heads.released import save_head
from dinokit.hub import RELEASED
from dinokit.hub.dinov3 import ConvNeXt, DINOv3
from dinokit.hub.entry import DINO, DINOv2, LinearClassifier, cached_path, fetch
from dinokit.models import Input
from dinokit.models.vit import Config, VisionTransformer
from dinokit.weights import save_backbone
from dinokit.weights.formats import section_of

ROOT = Path(__file__).parents[2]
hubconf = SimpleNamespace(**run_path(str(ROOT / "hubconf.py")))
IMAGENET = Input(28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = {"width": 128, "depth": 2, "heads": 2}
SCRIPT = """
import sys
from pathlib import Path
for name in ("omegaconf", "safetensors", "timm", "numpy", "rich", "PIL", "torchvision", "transformers"):
    sys.modules[name] = None  # as if it were not installed
sys.path = [p for p in sys.path if "finder" not in p and not Path(p, "dinokit").exists()]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import torch
try:
    import dinokit
except ImportError:
    pass
else:
    raise SystemExit("dinokit is installed here: this shows nothing")
model = torch.hub.load(sys.argv[1], "dinov2_vits14", source="local", weights=sys.argv[2], img_size=56)
import dinokit
assert dinokit.__file__.startswith(sys.argv[1]), dinokit.__file__
x = torch.ones(1, 3, 56, 56)
print(sorted(model.state_dict())[:2], tuple(model.eval()(x).shape), sorted(model.forward_features(x)))
sys.path.insert(0, sys.argv[1])
import hubconf
print(sum(callable(getattr(hubconf, name)) for name in dir(hubconf) if not name.startswith("_")))
"""


@pytest.fixture
def vit(drawn):
    return drawn(registers=4, pos_offset=0.0, pos_antialias=True)


def test_a_clone_works_without_installation_and_with_torch_only(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "dinokit", clone / "dinokit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", clone)
    torch.save(VisionTransformer(Config(size=56, patch=14)).state_dict(), tmp_path / "x.pth")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(clone), str(tmp_path / "x.pth")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    names, count = result.stdout.splitlines()
    assert names.startswith(
        "['blocks.0.attn.proj.bias', 'blocks.0.attn.proj.weight'] (1, 384) ['masks', 'x_norm"
    )
    assert int(count) == 2 * 8 + 4 + 3 * 4 + 3 + 7 + 4


def test_every_released_model_has_an_entry_point_of_its_name_and_size():
    for name, model in RELEASED.items():
        with torch.device("meta"):
            made = getattr(hubconf, name)(pretrained=False)
        assert sum(p.numel() for p in made.parameters()) == model.parameters
        kinds = {"dino": DINO, "dinov2": DINOv2, "dinov3": DINOv3 | ConvNeXt}
        assert isinstance(made, kinds[name.split("_")[0]])
        assert getattr(hubconf, name).__doc__.startswith(name)
    with torch.device("meta"):
        made = [hubconf.dinov2_vits14_lc(pretrained=False, layers=n).linear_head.in_features for n in (1, 4)]
    assert made == [2 * 384, 5 * 384]


def test_the_urls_are_those_of_the_released_files():
    base = "https://dl.fbaipublicfiles.com"
    assert RELEASED["dinov2_vitb14_reg"].url == f"{base}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    assert RELEASED["dinov2_vitg14"].url == f"{base}/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth"
    small = "dino_deitsmall8_pretrain"
    assert RELEASED["dino_vits8"].url == f"{base}/dino/{small}/{small}.pth"
    head = f"{base}/dinov2/dinov2_vits14/dinov2_vits14_reg4_linear4_head.pth"
    assert RELEASED["dinov2_vits14_reg"].linear_url(4) == head
    assert (
        RELEASED["dinov2_vits14"].linear_url(1)
        == f"{base}/dinov2/dinov2_vits14/dinov2_vits14_linear_head.pth"
    )


def test_a_file_in_the_cache_of_torch_hub_is_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = cached_path(RELEASED["dinov2_vits14"].url)
    assert path == tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    path.parent.mkdir(parents=True)
    torch.save(VisionTransformer(Config(size=518, patch=14)).state_dict(), path)
    model = hubconf.dinov2_vits14()
    assert torch.equal(model.pos_embed, torch.load(path)["pos_embed"])
    assert all(p.requires_grad for p in model.parameters())


def test_a_failed_download_names_the_path_for_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        OSError, match=r"cannot be downloaded: .*Put it at .*x.pth yourself, or give weights=PATH"
    ):
        fetch((tmp_path / "nowhere" / "x.pth").as_uri())


def test_forward_gives_class_tokens_and_with_is_training_the_features(vit):
    model, x = DINOv2(vit), torch.randn(2, 3, 56, 42)
    features = model(x, is_training=True)
    assert set(features) == {
        "x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks"
    }  # fmt: skip
    shapes = {name: tuple(value.shape) for name, value in features.items() if value is not None}
    assert shapes == {
        "x_norm_clstoken": (2, 128),
        "x_norm_regtokens": (2, 4, 128),
        "x_norm_patchtokens": (2, 12, 128),
        "x_prenorm": (2, 17, 128),
    }
    assert torch.equal(model(x), features["x_norm_clstoken"])
    prenorm = vit.norm(features["x_prenorm"])
    torch.testing.assert_close(prenorm[:, 5:], features["x_norm_patchtokens"])


def test_lists_of_images_of_different_sizes_are_single_ones_in_a_list(vit):
    model = DINOv2(vit)
    xs = [torch.randn(2, 3, 56, 56), torch.randn(1, 3, 28, 42)]
    masks = [torch.rand(2, 16) < 0.5, None]
    for got, x, mask in zip(model.forward_features(xs, masks), xs, masks, strict=True):
        torch.testing.assert_close(
            got["x_norm_patchtokens"], model.forward_features(x, mask)["x_norm_patchtokens"]
        )
    assert [tuple(cls.shape) for cls in model(xs)] == [(2, 128), (1, 128)]


def test_intermediate_layers_have_the_arguments_of_dinov2(vit):
    model, x = DINOv2(vit), torch.randn(2, 3, 56, 42)
    ((patches, cls),) = model.get_intermediate_layers(x, 1, reshape=True, return_class_token=True)
    assert patches.shape == (2, 128, 4, 3)
    assert torch.equal(cls, model(x))
    raw, again = (model.get_intermediate_layers(x, n=[0, 1], norm=norm) for norm in (False, True))
    torch.testing.assert_close(vit.norm(raw[0]), again[0])


def test_names_in_the_state_dict_are_official_and_moving_the_model_moves_all(vit):
    model = DINOv2(vit)
    assert set(model.state_dict()) == set(vit.state_dict())
    assert {name for name, _ in model.named_parameters()} == set(vit.state_dict())
    assert model.double()(torch.randn(1, 3, 28, 28, dtype=torch.float64)).dtype == torch.float64
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert not model(torch.randn(1, 3, 28, 28, dtype=torch.float64)).any()
    assert (model.embed_dim, model.patch_size, model.num_register_tokens, model.num_heads) == (128, 14, 4, 2)


def test_a_new_head_is_part_of_the_model(vit):
    model = DINOv2(vit)
    model.head = torch.nn.Linear(128, 7)
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 7)
    assert {"head.weight", "head.bias"} <= set(model.state_dict())


def test_dino_models_have_the_api_of_dino(drawn):
    vit = drawn(layer_scale=0.0, mask_token=False)
    model, x = DINO(vit), torch.randn(2, 3, 56, 56)
    first, last = model.get_intermediate_layers(x, 2)
    assert first.shape == (2, 17, 128)
    assert torch.equal(last[:, 0], model(x))
    weights = model.get_last_selfattention(x)
    assert weights.shape == (2, 2, 17, 17)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 17))
    block, rows = vit.blocks[1], vit.get_intermediate_layers(x, [0], return_class_token=True, norm=False)[0]
    rows = torch.cat([rows[1][:, None], rows[0]], dim=1)
    value = block.attn.qkv(block.norm1(rows)).unflatten(2, (3, 2, 64))[:, :, 2]  # (b, tokens, heads, d)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    after = rows + block.attn.proj(mixed)
    torch.testing.assert_close(vit.norm(after + block.mlp(block.norm2(after))), last)


def test_the_classifier_sees_class_tokens_in_order_and_the_mean_patch(vit):
    x = torch.randn(2, 3, 56, 56)
    for layers in (1, 2):
        model = LinearClassifier(DINOv2(vit), layers)
        blocks = [
            vit.get_intermediate_layers(x, [2 - layers + i], return_class_token=True)[0]
            for i in range(layers)
        ]
        seen = torch.cat([*(cls for _, cls in blocks), blocks[-1][0].mean(dim=1)], dim=1)
        torch.testing.assert_close(model(x), seen @ model.linear_head.weight.T + model.linear_head.bias)
    assert {"linear_head.weight", "backbone.cls_token"} <= set(model.state_dict())


def test_a_trained_backbone_has_the_same_api(vit, tmp_path):
    save_backbone(tmp_path / "run" / "teacher.safetensors", vit, section_of(vit))
    model = hubconf.dinokit_backbone(weights=tmp_path / "run")
    x = torch.randn(1, 3, 56, 56)
    assert torch.equal(model(x), vit([x], [None])[0].cls)
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match=r"dinov2_vits14 takes no image_size; it takes img_size"):
        hubconf.dinov2_vits14(pretrained=False, image_size=224)
    with pytest.raises(ValueError, match=r"layers=2: there are linear classifiers for 1 block and for 4"):
        hubconf.dinov2_vits14_lc(pretrained=False, layers=2)


@pytest.mark.parametrize(("kind", "layers"), [("ld", 1), ("ld", 4), ("dd", 4)])
def test_depth_heads_are_read_from_local_files(tmp_path, kind, layers):
    torch.manual_seed(0)
    vit = VisionTransformer(Config(size=28, patch=14, width=384, depth=12, heads=6, layer_scale=1.0))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    vit.input = IMAGENET
    head = LinearDepth(384, layers, 1e-3, 10.0) if kind == "ld" else DPT(384, 1e-3, 10.0)
    torch.nn.init.normal_(head.conv_depth.weight if kind == "ld" else head.project.conv.weight)
    save_head(tmp_path / "head.pth", head)
    files = {"backbone_weights": tmp_path / "vit.pth", "head_weights": tmp_path / "head.pth", "img_size": 28}
    entry = getattr(hubconf, f"dinov2_vits14_{kind}")
    images = torch.rand(1, 3, 28, 42)
    blocks = [11] if layers == 1 else [2, 5, 8, 11]
    with torch.no_grad():
        depth = entry(layers=layers, **files)(images)
        given = head.eval()(dense(vit.eval(), images, blocks, norm=False)).clamp(1e-3, 10.0)
        torch.testing.assert_close(depth, to_size(given, 28, 42))
        assert depth.std() > 0
        kitti = entry(layers=layers, weights="KITTI", **files)
        assert kitti.head.max_depth == 80.0
        far = kitti(images)
        if kind == "ld":
            torch.testing.assert_close(entry(layers=layers, hub_range_bug=True, **files)(images), far)


@pytest.mark.parametrize(("kind", "layers"), [("ld", 1), ("ld", 4), ("dd", 4)])
def test_a_depth_model_without_files_is_initialised_at_random(kind, layers):
    entry = getattr(hubconf, f"dinov2_vits14_{kind}")
    model = entry(pretrained=False, layers=layers, weights="KITTI", img_size=28)
    with torch.no_grad():
        depth = model(torch.rand(1, 3, 28, 28))
    assert depth.shape == (1, 1, 28, 28)
    assert (model.head.min_depth, model.head.max_depth) == (1e-3, 80.0)
    assert 1e-3 * (1 - 1e-5) <= depth.min() <= depth.max() <= 80 * (1 + 1e-5)  # the change of size rounds
    if kind == "ld":
        assert depth.max() > 20  # random bins give the middle of the range


def test_a_depth_head_that_was_not_released_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers=2 and weights='NYU': they use 1 or 4"):
        hubconf.dinov2_vits14_ld(pretrained=False, layers=2)
    with pytest.raises(ValueError, match=r"weights='SUN': they use 1 or 4 blocks, were trained on NYU and K"):
        hubconf.dinov2_vits14_dd(pretrained=False, weights="SUN", head_weights=tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"weights='SUN': they use 1 or 4 blocks, were trained on NYU and K"):
        hubconf.dinov2_vits14_ld(pretrained=False, weights="SUN")


def bn_head(width, classes):
    """The tensors of a released segmentation head, by their names in the file."""
    return {
        "conv_seg.weight": torch.randn(classes, width, 1, 1), "conv_seg.bias": torch.randn(classes),
        "bn.weight": torch.rand(width) + 0.5, "bn.bias": torch.randn(width),
        "bn.running_mean": torch.randn(width), "bn.running_var": torch.rand(width) + 0.5,
        "bn.num_batches_tracked": torch.tensor(40_000),
    }  # fmt: skip


@pytest.mark.parametrize(("layers", "weights", "classes"), [(1, "ADE20K", 150), (4, "VOC2012", 21)])
def test_segmentation_heads_are_read_from_local_files(tmp_path, layers, weights, classes):
    torch.manual_seed(0)
    official = hubconf.dinov2_vits14(pretrained=False, img_size=28).eval()
    torch.save(official.state_dict(), tmp_path / "vit.pth")
    head = bn_head(384 * layers, classes)
    tensors = {f"decode_head.{key}": value for key, value in head.items()}
    torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": tensors}, tmp_path / "head.pth")
    files = {"backbone_weights": tmp_path / "vit.pth", "head_weights": tmp_path / "head.pth", "img_size": 28}
    model = hubconf.dinov2_vits14_seg(layers=layers, weights=weights, **files)
    images = torch.randint(256, (1, 3, 30, 45), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))
    x = F.pad((images / 255 - mean) / std, (5, 6, 6, 6))  # to 42 x 56, the odd pixel on the right
    with torch.no_grad():
        x = torch.cat(official.get_intermediate_layers(x, layers, reshape=True), dim=1)
        x = F.batch_norm(
            x, head["bn.running_mean"], head["bn.running_var"], head["bn.weight"], head["bn.bias"]
        )
        x = F.conv2d(x, head["conv_seg.weight"], head["conv_seg.bias"])
        want = F.interpolate(x, (30, 45), mode="bilinear", align_corners=False)
        got = model(images)
    assert got.shape == (1, classes, 30, 45)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"head.pth is a head with layers={layers}: give that"):
        hubconf.dinov2_vits14_seg(layers=5 - layers, weights=weights, **files)
    wrong = {"ADE20K": "VOC2012", "VOC2012": "ADE20K"}[weights]
    with pytest.raises(ValueError, match=rf"has {classes} classes, and {wrong} has"):
        hubconf.dinov2_vits14_seg(layers=layers, weights=wrong, **files)


def test_a_file_of_another_head_is_refused(tmp_path):
    file = tmp_path / "x.pth"
    base = {"pretrained": False, "img_size": 28, "head_weights": file}
    torch.save({"state_dict": {f"decode_head.{k}": v for k, v in bn_head(768, 150).items()}}, file)
    with pytest.raises(ValueError, match=r"backbone 384 wide: it takes 768 numbers per patch, not 384 or"):
        hubconf.dinov2_vits14_seg(layers=1, **base)
    save_head(file, LinearDepth(768, 1, 1e-3, 10.0))
    with pytest.raises(ValueError, match=r"another kind of head: it has no conv_seg.weight .* conv_depth.w"):
        hubconf.dinov2_vits14_seg(layers=1, **base)
    with pytest.raises(
        ValueError, match=r"on a backbone 384 wide: it takes 1536 numbers per patch, not 768 or"
    ):
        hubconf.dinov2_vits14_ld(layers=1, **base)
    with pytest.raises(ValueError, match=r"x.pth is not the classifier of dinov2_vits14 with layers=4: Miss"):
        hubconf.dinov2_vits14_lc(**base)
    with pytest.raises(ValueError, match=r"weights='COCO': they use 1 or 4 blocks, were trained on ADE"):
        hubconf.dinov2_vits14_seg(pretrained=False, weights="COCO")


def test_a_file_of_dinokit_sets_the_normalisation(tmp_path):
    vit = VisionTransformer(Config(size=28, patch=14, width=384, depth=12, heads=6, layer_scale=1.0))
    vit.input = Input(28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_backbone(tmp_path / "x.safetensors", vit, section_of(vit))
    files = {"backbone_weights": tmp_path / "x.safetensors", "img_size": 56}
    model = hubconf.dinov2_vits14_seg(pretrained=False, **files)
    assert model.backbone.input == Input(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
