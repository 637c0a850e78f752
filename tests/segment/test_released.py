"""Released SAM and SegGPT: folders of transformers at random weights, against its own processors."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.segment.by_example import ByExample
from dinokit.segment.predictor import Predictor

transformers = pytest.importorskip("transformers")


def normal(model):
    torch.manual_seed(3)  # whose masks are not empty
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    vision = {
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 16, "output_channels": 64, "mlp_dim": 32, "window_size": 2,
        "global_attn_indexes": [0], "num_pos_feats": 32,
    }  # fmt: skip
    prompts = {"hidden_size": 64, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 64, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 64}
    sections = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    config = transformers.SamConfig(**sections)
    normal(transformers.SamModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seggpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seggpt")
    config = transformers.SegGptConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=[64, 32], patch_size=8,
        pretrain_image_size=32, decoder_hidden_size=8, merge_index=0,
        intermediate_hidden_state_indices=[1, 2],
    )  # fmt: skip
    normal(transformers.SegGptForImageSegmentation(config)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.SegGptImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))


@torch.no_grad()
def test_masks_are_those_of_transformers(sam, photo):
    """An image as large as the canvas, so that both see the same pixels and points."""
    predictor, model = Predictor.load(sam, device="cpu"), transformers.SamModel.from_pretrained(sam).eval()
    processor = transformers.SamProcessor(transformers.SamImageProcessor(
        size={"longest_edge": 64}, mask_size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_pad_size={"height": 64, "width": 64},
    ))  # fmt: skip
    predictor.set_image(photo)
    points, signs = [[20, 30], [50, 9]], [1, 0]
    inputs = processor(photo, input_points=[[points]], input_labels=[[signs]], return_tensors="pt")
    theirs = model(**inputs, multimask_output=False)
    answer = predictor.predict(points, signs)
    torch.testing.assert_close(answer.logits, theirs.pred_masks[0, 0], rtol=1e-3, atol=1e-3)
    assert answer.quality == pytest.approx(theirs.iou_scores[0, 0].numpy(), rel=1e-3)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    (masks,) = processor.image_processor.post_process_masks(
        theirs.pred_masks, *sizes, pad_size={"height": 64, "width": 64}
    )
    assert (answer.masks == masks[0].numpy()).mean() > 0.99
    three = model(**inputs, multimask_output=True)
    several = predictor.predict(points, signs, several=True)
    order = three.iou_scores[0, 0].argsort(descending=True)
    torch.testing.assert_close(several.logits, three.pred_masks[0, 0, order], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_masks_of_boxes_and_of_masks_are_those_of_transformers(sam, photo):
    predictor, model = Predictor.load(sam, device="cpu"), transformers.SamModel.from_pretrained(sam).eval()
    predictor.set_image(photo)
    pixels = predictor.encoder.encode(photo)[1]
    mask = 4 * torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    box, point = (3, 4, 40, 30), [20, 30]
    corners = {"input_boxes": torch.tensor([[box]]) - 0.5}  # indices of pixels, and ours are edges
    points = {"input_points": torch.tensor([[[point]]]).float(), "input_labels": torch.ones(1, 1, 1).long()}
    masks = {"input_masks": mask[None]}
    prompts = [
        ({"box": box}, corners),
        ({"points": [point], "mask": mask}, points | masks),
        ({"box": box, "points": [point]}, corners | points),
        ({"box": box, "mask": mask}, corners | masks),
    ]
    answers = []
    for ours, theirs in prompts:
        answer, output = predictor.predict(**ours), model(pixels, **theirs, multimask_output=False)
        torch.testing.assert_close(answer.logits, output.pred_masks[0, 0])
        assert answer.quality == pytest.approx(output.iou_scores[0, 0].numpy(), rel=1e-5)
        answers.append(answer.logits)
    gaps = [(a - b).abs().max() for i, a in enumerate(answers) for b in answers[:i]]
    assert min(gaps) > 1e-3  # every part of a prompt matters


def test_files_in_16_bits_are_read(sam, photo, tmp_path):
    transformers.SamModel.from_pretrained(sam).half().save_pretrained(tmp_path)
    predictor = Predictor.load(tmp_path, device="cpu")
    predictor.set_image(photo)
    assert predictor.predict([(20, 30)]).logits.dtype == torch.float32


def test_of_one_click_the_likeliest_mask_is_the_answer(sam, photo):
    predictor = Predictor.load(sam, device="cpu")
    predictor.set_image(photo)
    several = predictor.predict([(20, 30)], several=True)
    one = predictor.predict([(20, 30)])
    assert torch.equal(one.logits, several.logits[:1])
    assert one.masks.shape == (1, 40, 64)
    refined = predictor.refine([(3, 3)], signs=[0])
    assert not torch.equal(refined.logits, one.logits)
    assert predictor.predict(box=(3, 4, 40, 30)).logits.shape == (1, 16, 16)
    found = predictor.everything(side=4, quality=-1e9, stability=0, overlap=1)
    assert len(found) > 1


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, 2])
def test_numbers_are_those_of_transformers(seggpt, photo, shots):
    mask = np.zeros((40, 64), np.uint8)
    mask[5:20, 10:30], mask[25:35, 30:60] = 1, 2
    segmenter = ByExample.load(seggpt, device="cpu")
    segmenter.set_examples([(photo, mask), (photo.rotate(180), mask)][:shots])
    new = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    model = transformers.SegGptForImageSegmentation.from_pretrained(seggpt).eval()
    processor = transformers.SegGptImageProcessor.from_pretrained(seggpt)
    inputs = processor(
        images=[new] * shots, prompt_images=[photo, photo.rotate(180)][:shots], prompt_masks=[mask] * shots,
        num_labels=2, return_tensors="pt",
    )  # fmt: skip
    output = model(**inputs, feature_ensemble=shots > 1, embedding_type="semantic")
    theirs = processor.post_process_semantic_segmentation(output, [(40, 64)] * shots, num_labels=2)[0]
    ours = segmenter.predict(new)
    assert ours.shape == (40, 64)
    assert len(np.unique(ours)) > 1
    assert (ours == theirs.numpy()).all()


def test_released_models_on_the_command_line(sam, seggpt, photo, tmp_path, capsys):
    photo.save(tmp_path / "photo.png")
    words = ["segment", str(tmp_path / "photo.png"), "device=cpu"]
    assert main([*words, f"weights={sam}", "points=[[20,30]]", f"out={tmp_path / 'mask.png'}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["masks"] == 1
    Image.fromarray(np.eye(40, 64, dtype=np.uint8) * 255).save(tmp_path / "example.png")
    like = f"like=[{tmp_path}/photo.png,{tmp_path}/example.png]"
    assert main([*words, f"weights={seggpt}", like, f"out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "photo.png").is_file()


def test_what_is_no_released_model_is_named(sam, seggpt, tmp_path, monkeypatch):
    with pytest.raises(
        LookupError, match=r"no folder of a released sam model: its config.json says .*=seggpt"
    ):
        Predictor.load(seggpt)
    with pytest.raises(LookupError, match=r"it has no config.json. Give one, or head=RUN"):
        ByExample.load(tmp_path)
    (tmp_path / "config.json").write_text((sam / "config.json").read_text())
    with pytest.raises(LookupError, match=r"no file .*model\.safetensors"):
        Predictor.load(tmp_path)
    with pytest.raises(LookupError, match=r"it has no config.json"):
        Predictor.load(sam / "model.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers, .* pip install '\.\[huggingface\]'"):
        Predictor.load(sam)


def changed(folder, copy, section=None, **values):
    """A copy of a folder, whose config.json, or a section of it, has other values."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (config[section] if section else config).update(values)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_an_index_that_lists_files_elsewhere_is_refused(sam, tmp_path):
    folder = changed(sam, tmp_path / "sam")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = transformers.SamModel.from_pretrained(sam).state_dict()
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")})
    )
    with pytest.raises(ValueError, match=r"index.json is no index .* which is no file beside it"):
        Predictor.load(folder, device="cpu")


def test_a_model_in_several_files_is_read(sam, photo, tmp_path):
    transformers.SamModel.from_pretrained(sam).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    answers = []
    for folder in (sam, tmp_path):
        predictor = Predictor.load(folder, device="cpu")
        predictor.set_image(photo)
        answers.append(predictor.predict([(20, 30)]).logits)
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("vision_config", {"mlp_dim": 10**9}, "mlp_dim=1000000000, and 32768 is the most"),
        ("vision_config", {"mlp_dim": 30_000}, r"layers\.0\.mlp\.lin1\.weight: copying a param with shape"),
        ("vision_config", {"num_hidden_layers": 10**4}, "num_hidden_layers=10000, and its file has"),
        (
            "vision_config",
            {"num_hidden_layers": 2},
            r"lacks tensors of a sam model: .*layers\.1",
        ),
        ("vision_config", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("vision_config", {"image_size": [64, 64]}, "cannot be read: TypeError"),
        ("vision_config", {"hidden_size": "large"}, "cannot be read"),
        ("prompt_encoder_config", {"image_size": 32_000}, "two values of image_size"),
        (
            "vision_config",
            {"_attn_implementation": "some/kernel"},
            "=some/kernel, which needs other code",
        ),
        (None, {"quantization_config": {"quant_method": "awq"}}, "quantization_config=.*, which needs"),
        (None, {"vision_config": 5}, "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_no_model_of_its_tensors_has_is_refused_by_its_folder(
    sam, tmp_path, section, values, says
):
    with pytest.raises(ValueError, match=rf"weights={tmp_path} (?s:.*){says}"):
        Predictor.load(changed(sam, tmp_path, section, **values), device="cpu")


@pytest.mark.parametrize(
    "values", [{"image_size": 32}, {"num_attention_heads": 0}, {"patch_size": 0}], ids=str
)
def test_a_seggpt_with_other_sizes_is_refused_by_its_folder(seggpt, tmp_path, values):
    with pytest.raises(ValueError, match=f"weights={tmp_path} cannot be read"):
        ByExample.load(changed(seggpt, tmp_path, **values), device="cpu")


@pytest.mark.parametrize(
    "values",
    [
        {"image_mean": "abc"}, {"image_mean": [0.5]}, {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_std": [1, 0, 1]}, {"image_std": [1, 1, float("inf")]}, {"image_std": None},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["sam", "seggpt"])
def test_a_normalisation_that_is_none_is_refused_by_its_folder(kind, values, request, tmp_path):
    folder = changed(request.getfixturevalue(kind), tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"weights={tmp_path} cannot be read"):
        (Predictor if kind == "sam" else ByExample).load(folder, device="cpu")


def test_the_normalisation_is_that_of_either_file_of_transformers(sam, photo, tmp_path):
    folder = changed(sam, tmp_path)
    image_processor = transformers.SamImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    for processor in (image_processor, transformers.SamProcessor(image_processor)):
        for path in folder.glob("*processor_config.json"):
            path.unlink()
        processor.save_pretrained(folder)
        read = Predictor.load(folder, device="cpu").encoder
        assert read.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert read.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 10**5, ""], ids=["open", "list", "deep", "empty"])
def test_a_damaged_file_of_settings_is_refused_by_its_name(sam, tmp_path, name, text):
    folder = changed(sam, tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"/{name} is not readable as JSON"):
        Predictor.load(folder, device="cpu")
