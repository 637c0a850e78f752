"""Folders for other libraries: their model card, the upload that is refused early, and backbones of timm."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch

import dinokit
from dinokit.__main__ import main
from dinokit.config.load import load_recipe, to_yaml
from dinokit.weights import save_backbone
from dinokit.weights.formats import section_of


@pytest.fixture
def run(drawn, tmp_path):
    """The folder of a run with weights, a recipe with private places in it, and one result."""
    folder, vit = tmp_path / "run", drawn(width=64, heads=1)
    folder.mkdir()
    recipe = load_recipe(
        "scenes_cpu", ["data.name=folder", "data.path=/home/marie/secret", f"run.out={folder}"]
    )
    save_backbone(folder / "teacher.safetensors", vit, section_of(vit), to_yaml(recipe))
    about = {"about": {"time": "2026-11-29T10:00:00+0000"}, "images_test": 120}
    line = {"eval": "knn", "weights": str(folder), "top1@20": 0.8125, **about}
    (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_a_folder_for_hugging_face_has_a_card_with_recipe_figures_licence_and_limits(run, tmp_path, capsys):
    out = tmp_path / "marie-vits"
    assert main(["export", f"weights={run}", "to=hf", f"out={out}", "licence=cc-by-4.0", "--traceback"]) == 0
    shown = capsys.readouterr()
    assert "Model card: " in shown.out
    assert "Loading weights" not in shown.err  # a progress bar of transformers
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= {
        file.name for file in out.iterdir()
    }
    text = (out / "README.md").read_text()
    head = text.split("---\n")[1]
    assert "license: cc-by-4.0\nlibrary_name: transformers\n" in head
    assert "# marie-vits\n" in text
    assert f"AutoModel.from_pretrained('{out}')" in text
    assert "Recipe `scenes_cpu` of dinokit" in text
    assert "| knn | top1@20 0.8125 | 120 |" in text
    assert "## Limits" in text
    assert "2304.07193" in text
    assert "secret" not in text


def test_a_card_without_licence_or_recipe_says_so(drawn, tmp_path):
    vit = drawn(width=64, heads=1)
    lines = dinokit.export(vit, "timm", tmp_path / "t")
    assert "it states no licence" in lines[-1]
    text = (tmp_path / "t/README.md").read_text()
    assert "license: other" in text
    assert "has not stated a licence" in text
    assert "does not say how it was trained" in text
    assert "None were measured" in text
    assert not (dinokit.export(vit, "timm", tmp_path / "a.safetensors")[-1]).startswith("Model card")


def test_a_folder_with_files_of_somebody_else_is_refused_and_an_older_export_replaced(run, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("about my photos")
    assert main(["export", f"weights={run}", "to=timm", f"out={mine}"]) == 2
    assert "has files that no export wrote, such as README.md" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["README.md"]
    assert (mine / "README.md").read_text() == "about my photos"
    (mine / "README.md").rename(mine / ".hidden")
    for _ in range(2):
        assert main(["export", f"weights={run}", "to=timm", f"out={mine}"]) == 0


def test_an_upload_that_cannot_succeed_is_refused_before_anything_is_written(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    words = ["export", f"weights={run}", f"out={tmp_path / 'out'}"]
    cases = [
        (["to=hf", "push=marie"], "it is USER/NAME"),
        (["to=hf", "push=marie/vits"], "hf auth login"),
        (["to=onnx", "push=marie/vits"], "push= uploads a folder"),
    ]
    for more, message in cases:
        assert main([*words, *more]) != 0
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main([*words, "to=hf", "push=marie/vits"]) != 0
    assert "pip install huggingface_hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def of_timm():
    torch.manual_seed(0)
    return dinokit.create_model("timm_vit", model="vit_tiny_patch16_224", size=32)


def test_a_backbone_of_timm_goes_back_to_timm(of_timm, tmp_path):
    dinokit.export(of_timm, "timm", tmp_path / "t")
    model = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        rows = model.forward_features(x)
        expected = of_timm([x], [None])[0]
    torch.testing.assert_close(rows[:, 0], expected.cls)
    torch.testing.assert_close(rows[:, 1:], expected.patches)
    config = json.loads((tmp_path / "t/config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"


@pytest.mark.slow
def test_a_backbone_of_timm_becomes_a_graph_for_images_of_one_size(of_timm, tmp_path):
    dinokit.export(of_timm, "onnx", tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 32, 32)
    cls, _ = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        assert np.allclose(cls, of_timm([x], [None])[0].cls, atol=1e-4)


def test_other_backbones_and_formats_are_refused_with_what_there_is(of_timm, tmp_path):
    with pytest.raises(ValueError, match="to=timm and to=onnx, not hf"):
        dinokit.export(of_timm, "hf", tmp_path / "h")
    with pytest.raises(ValueError, match=r"A `vit`, .* can be exported"):
        dinokit.export(dinokit.create_model("pixels"), "timm", tmp_path / "p")
