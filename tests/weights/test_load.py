"""Files as other projects write them, compared with their own models; and other files."""

import json
import os
import pickle
from argparse import Namespace

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from dinokit.models import Input
from dinokit.models.vit import VisionTransformer
from dinokit.weights import describe, load_backbone
from dinokit.weights.load import read

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
CLOSE = {"rtol": 0, "atol": 1e-5}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def redrawn(model):
    """Every tensor drawn, so that each one counts."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def same(backbone, x, cls, patches) -> None:
    tokens = backbone([x], [None])[0]
    torch.testing.assert_close(tokens.cls, cls, **CLOSE)
    torch.testing.assert_close(tokens.patches, patches, **CLOSE)


def chunked(tensors, prefix, each):
    """Names as DINOv2 trains, with `each` blocks in a chunk: blocks.CHUNK.NUMBER."""
    renamed = {}
    for name, value in tensors.items():
        first, *rest = name.split(".")
        parts = [first, str(int(rest[0]) // each), *rest] if first == "blocks" else [name]
        renamed[prefix + ".".join(parts)] = value
    return renamed


def test_dino_s_pretrain_file(drawn, tmp_path):
    vit = drawn(patch=16, size=64, layer_scale=0.0, mask_token=False)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    x = torch.randn(2, 3, 80, 64)
    back = load_backbone(tmp_path / "x.pth")
    same(back, x, *vit.get_intermediate_layers(x, 1, return_class_token=True)[0][::-1])
    assert back.input == Input(64, *IMAGENET)
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())


def test_dino_s_full_checkpoint_gives_the_teacher(drawn, tmp_path):
    teacher, student = (drawn(layer_scale=0.0, mask_token=False) for _ in range(2))
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_g": torch.zeros(4, 1)}
    checkpoint = {
        "student": {f"module.backbone.{n}": t for n, t in student.state_dict().items()},
        "teacher": {f"backbone.{n}": t for n, t in teacher.state_dict().items()} | head,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(checkpoint, tmp_path / "x.pth")
    x = torch.randn(1, 3, 56, 56)
    tokens = teacher([x], [None])[0]
    same(load_backbone(tmp_path / "x.pth"), x, tokens.cls, tokens.patches)
    _, found = read(tmp_path / "x.pth")
    assert found.format == "DINO, full checkpoint"
    assert found.ignored == ["head (2 tensors)", "student", "optimizer", "epoch", "args", "dino_loss"]


@pytest.mark.parametrize("zipped", [True, False])
def test_dinov2_s_pretrain_file_in_the_zip_and_in_the_old_format(architecture, drawn, tmp_path, zipped):
    vit = drawn(**architecture)
    torch.save(vit.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    x = torch.randn(1, 3, vit.side * vit.patch + vit.patch, vit.side * vit.patch)
    tokens = vit([x], [None])[0]
    same(load_backbone(tmp_path / "x.pth"), x, tokens.cls, tokens.patches)


def test_a_training_checkpoint_of_dinov2_with_blocks_in_chunks(drawn, tmp_path):
    vit = drawn(depth=4)
    dump = chunked(vit.state_dict(), "backbone.", each=2)
    assert "backbone.blocks.1.3.norm1.weight" in dump
    dump |= {"dino_head.last_layer.weight_g": torch.ones(8, 1), "ibot_head.mlp.0.bias": torch.ones(3)}
    torch.save({"teacher": dump}, tmp_path / "teacher_checkpoint.pth")
    tokens = vit([x := torch.randn(1, 3, 56, 56)], [None])[0]
    same(load_backbone(tmp_path / "teacher_checkpoint.pth"), x, tokens.cls, tokens.patches)
    found = read(tmp_path / "teacher_checkpoint.pth")[1]
    assert found.format == "DINOv2, training dump"
    assert found.ignored == ["dino_head (1 tensors)", "ibot_head (1 tensors)"]


TIMM = [
    ("vit_small_patch14_dinov2", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_giant_patch14_dinov2", {"mlp_ratio": 688 / 128}),
    ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 688 / 128}),
    ("vit_small_patch16_224.dino", {"patch_size": 8}),
]


@pytest.mark.parametrize(("name", "values"), TIMM)
def test_timm_s_models(tmp_path, name, values):
    model = redrawn(
        timm.create_model(name, embed_dim=128, depth=2, num_heads=2, img_size=56, num_classes=0, **values)
    )
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    x = torch.randn(2, 3, 56, 56)
    rows = model.forward_features(x)
    patches = rows[:, model.num_prefix_tokens :]
    same(load_backbone(tmp_path / "x.safetensors"), x, rows[:, 0], patches)


def test_heads_and_input_are_read_from_the_folder_of_timm(tmp_path):
    name = "vit_small_patch14_dinov2"
    model = redrawn(timm.create_model(name, embed_dim=128, depth=1, num_heads=4, img_size=56, num_classes=0))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    about = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": name, "model_args": {"num_heads": 4}, "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = model.forward_features(x := torch.randn(2, 3, 56, 56))
    same(back := load_backbone(tmp_path), x, rows[:, 0], rows[:, 1:])
    assert back.input == Input(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


HF = [
    ("Dinov2", {}),
    ("Dinov2", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", {}),
    ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
    ("ViT", {"intermediate_size": 512, "layer_norm_eps": 1e-6}),
]


@pytest.mark.parametrize("wrapped", ["Model", "ForImageClassification"])
@pytest.mark.parametrize(("name", "values"), HF)
def test_hugging_face_s_models_and_those_inside_a_classifier(tmp_path, name, values, wrapped):
    config = getattr(transformers, f"{name}Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, **values
    )
    model = redrawn(getattr(transformers, f"{name}{wrapped}")(config))
    model.save_pretrained(tmp_path)
    if (name, wrapped) == ("ViT", "ForImageClassification"):  # trained with labels
        with pytest.raises(ValueError, match=r"classifier.*It looks like a ViT trained with labels"):
            load_backbone(tmp_path)
        return
    x = torch.randn(2, 3, 56, 56)
    rows = getattr(model, model.base_model_prefix, model)(x).last_hidden_state
    same(load_backbone(tmp_path), x, rows[:, 0], rows[:, -16:])
    torch.save(
        model.state_dict(), tmp_path / "in_memory.pth"
    )  # newer names, and no config.json that is its own
    same(load_backbone(tmp_path / "in_memory.pth", heads=4), x, rows[:, 0], rows[:, -16:])


def test_a_model_in_several_files(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56
    )
    model = redrawn(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    rows = model(x := torch.randn(1, 3, 56, 56)).last_hidden_state
    back = load_backbone(tmp_path / "model.safetensors.index.json")
    assert torch.equal(back.norm.weight, model.layernorm.weight)
    assert torch.equal(load_backbone(tmp_path).cls_token, back.cls_token)
    assert rows.shape[1] == 1 + back([x], [None])[0].patches.shape[1]
    shards[0].unlink()
    with pytest.raises(LookupError, match=f"missing: {shards[0].name}"):
        load_backbone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
def test_vit_s_14_at_its_real_size_is_timm_s(tmp_path, registers):
    name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2"
    model = redrawn(timm.create_model(name, num_classes=0))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    back = load_backbone(tmp_path / "x.safetensors")
    rows = model.forward_features(x := torch.randn(1, 3, 518, 518))
    same(back, x, rows[:, 0], rows[:, 1 + registers :])
    assert back.input.size == 224


def test_half_precision_is_loaded_as_float32(drawn, tmp_path):
    save_file({n: t.half() for n, t in drawn().state_dict().items()}, tmp_path / "x.safetensors")
    assert {p.dtype for p in load_backbone(tmp_path / "x.safetensors").parameters()} == {torch.float32}
    _, stored = read(tmp_path / "x.safetensors")
    assert stored.notes[-1] == "The file contains float16; the backbone is float32."


def test_loaded_tensors_do_not_change_with_the_file(drawn, tmp_path):
    for name, save in (("x.safetensors", save_file), ("x.pth", torch.save)):
        save(drawn().state_dict(), tmp_path / name)
        back = load_backbone(tmp_path / name)
        before = back.pos_embed.clone()
        with (tmp_path / name).open("r+b") as file:
            file.write(b"\xff" * (tmp_path / name).stat().st_size)
        assert torch.equal(back.pos_embed, before)


def test_an_unknown_number_of_heads_must_be_given(drawn, tmp_path):
    torch.save(drawn(width=48, heads=3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"its width, 48, is no multiple of 64: give heads=N"):
        load_backbone(tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth", heads=3).blocks[0].attn.heads == 3
    with pytest.raises(ValueError, match=r"backbone.width=48 is no multiple of backbone.heads=5"):
        load_backbone(tmp_path / "x.pth", heads=5)


def test_describe_gives_the_same_keys_for_any_file(drawn, tmp_path):
    torch.save(drawn().state_dict(), tmp_path / "x.pth")
    description = describe(tmp_path / "x.pth")
    assert description["recipe"] == ""
    assert description["backbone"]["name"] == "vit"
    assert description["tensors"]["cls_token"] == (1, 1, 128)


def test_an_incomplete_backbone_is_refused_unless_partial(drawn, tmp_path):
    tensors = drawn().state_dict()
    gone = tensors.pop("blocks.1.mlp.fc2.bias")
    torch.save({**tensors, "adapter.weight": gone}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"blocks.1.mlp.fc2.bias: asked for \(128,\), absent; adapter.weight: not"
    ):
        load_backbone(tmp_path / "x.pth")
    back = load_backbone(tmp_path / "x.pth", partial=True)
    assert isinstance(back, VisionTransformer)
    assert torch.equal(back.cls_token, tensors["cls_token"])
    assert back.blocks[1].mlp.fc2.bias.isfinite().all()


OTHER_MODELS = {
    "an object detector": ["backbone.body.layer1.0.conv1.weight", "rpn.head.conv.0.0.weight"],
    "a CLIP-like model": ["visual.class_embedding", "visual.conv1.weight", "logit_scale"],
    "a diffusion model": ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
    "a convolutional network": ["conv1.weight", "layer1.0.conv1.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight"],
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_kind_of_model_is_named(tmp_path, what):
    torch.save({name: torch.zeros(2, 2) for name in OTHER_MODELS[what]}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"contains no backbone that dinokit knows, but {what}"):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_tiny_patch16_224", "head.weight: not asked for.*It looks like a ViT trained with labels"),
        ("vit_base_patch16_clip_224", "norm_pre.*It looks like a CLIP-like model"),
        ("beit_base_patch16_224", "a Swin or BEiT, whose positions are relative"),
        ("vit_base_patch16_siglip_224", "contains no backbone that dinokit knows"),
        ("resnet18", "a convolutional network"),
        ("swin_tiny_patch4_window7_224", "a Swin or BEiT"),
    ],
)
def test_other_models_of_timm_are_refused(tmp_path, name, words):
    with torch.device("meta"):
        model = timm.create_model(name)
    tensors = {n: torch.zeros(t.shape, dtype=torch.uint8) for n, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words):
        load_backbone(tmp_path / "x.safetensors")


def test_a_masked_autoencoder_of_hugging_face_is_refused(tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTMAEConfig(**small, decoder_num_hidden_layers=1)
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder.*It looks like a masked autoencoder"):
        load_backbone(tmp_path)


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["zip", "old", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, way):
    file, trace = tmp_path / "x.pth", tmp_path / "it ran"
    data = {"cls_token": torch.ones(1, 1, 64), "more": Evil(trace)}
    if way == "pickle":
        file.write_bytes(pickle.dumps({"more": Evil(trace)}))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match=r"would run code of its own: it imports .*mkdir.*Nothing was run"):
        load_backbone(file)
    assert not trace.exists()


def test_a_pickled_module_is_refused_with_a_hint(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"Linear.*Nothing was run.*state_dict\(\)"):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_a_truncated_pth_is_reported(drawn, tmp_path, zipped, keep):
    file = tmp_path / "x.pth"
    torch.save(drawn().state_dict(), file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=r"it is truncated or damaged. Copy or download it again"):
        load_backbone(file)


def test_files_without_weights_are_refused(tmp_path):
    for name, data, words in (
        ("x.pth", b"Dear all,\nplease find attached", "it is a text that begins with b'Dear all"),
        ("x.pt", b"", "an empty file"),
        ("x.onnx", b"\x08\x07\x12\x07pytorch", "a graph of ONNX, which dinokit writes but does not read"),
        ("x.bin", b"\x00\xfe\x81" * 30, "is not a safetensors file, nor one of torch.save. Readable are"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            load_backbone(tmp_path / name)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="contains one list, not tensors by name"):
        load_backbone(tmp_path / "list.pth")
    torch.save({"epoch": 3, "ema": {"a": torch.ones(2)}}, tmp_path / "keys.pth")
    with pytest.raises(ValueError, match="its keys are: epoch, ema"):
        load_backbone(tmp_path / "keys.pth")


def test_a_pipeline_of_diffusers_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="a pipeline of the library diffusers"):
        load_backbone(tmp_path)
    tensors = {name: torch.ones(1) for name in ("conv_in.weight", "mid_block.resnets.0.norm1.bias")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a diffusion model"):
        load_backbone(tmp_path / "a.safetensors")


def test_the_name_of_a_released_model_is_no_file_and_its_list_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LookupError, match=r"released model.*`dinokit models dinov2_vits14` prints"):
        load_backbone("dinov2_vits14")
