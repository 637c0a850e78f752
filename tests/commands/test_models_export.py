"""`dinokit models` and `dinokit export` as they are typed."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.hub import RELEASED
from dinokit.weights import load_backbone, save_backbone


def typed(capsys, line: str) -> tuple[int, str, str]:
    status = main(line.split())
    output = capsys.readouterr()
    return status, output.out, output.err


def test_the_list_is_filtered_by_a_pattern(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    status, out, _ = typed(capsys, "models dinov2_vits*")
    assert status == 0
    lines = [line.split() for line in out.splitlines() if line.startswith("dinov2_vits")]
    assert [line[0] for line in lines] == ["dinov2_vits14", "dinov2_vits14_reg"]
    assert lines[0][1:] == ["22,056,576", "14", "Apache-2.0", "no", RELEASED["dinov2_vits14"].url]
    file = tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert " yes " in typed(capsys, "models dinov2_vits14")[1]


def test_a_pattern_that_meets_nothing_says_what_there_is(capsys):
    status, _, err = typed(capsys, "models dinov2_vits16")
    assert status == 2
    near = ("dino_vits16", "dinov2_vits14", "dinov3_vits16")
    assert any(f"Did you mean '{name}'" in err for name in near)


def test_identify_says_format_architecture_and_coverage(capsys, drawn, tmp_path):
    torch.save({"teacher": {f"backbone.{n}": t for n, t in drawn().state_dict().items()}}, tmp_path / "x.pth")
    status, out, _ = typed(capsys, f"models identify {tmp_path / 'x.pth'}")
    assert status == 0
    assert "DINOv2, training dump" in out
    assert "width=128, depth=2, heads=2, patch=14" in out
    assert "35 of 35 tensors; nothing missing, nothing left over" in out
    assert "2 of 64 channels are assumed" in out


def test_identify_of_a_part_names_what_is_missing_and_fails(capsys, drawn, tmp_path):
    tensors = drawn().state_dict()
    tensors.pop("norm.bias")
    torch.save(tensors, tmp_path / "x.pth")
    status, out, err = typed(capsys, f"models identify {tmp_path / 'x.pth'} heads=2")
    assert status == 2
    assert "34 of 35 tensors; 1 missing: norm.bias" in out
    assert "partial=True" in err


def test_export_prints_the_difference_and_how_to_open(capsys, drawn, tmp_path):
    torch.save(drawn().state_dict(), tmp_path / "x.pth")
    status, out, _ = typed(capsys, f"export weights={tmp_path / 'x.pth'} to=timm out={tmp_path / 'out'}")
    assert status == 0
    assert "Largest difference at 56 x 56 pixels: " in out
    assert f"timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["img_size"] == 56
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert load_backbone(tmp_path / "out").width == 128


def test_identify_says_what_a_vit_of_another_family_is(capsys, drawn, tmp_path):
    tensors = {**drawn(layer_scale=0.0, mask_token=False).state_dict(), "head.weight": torch.zeros(9, 128)}
    torch.save(tensors, tmp_path / "x.pth")
    status, _, err = typed(capsys, f"models identify {tmp_path / 'x.pth'}")
    assert status == 2
    assert "It looks like a ViT trained with labels" in err


@pytest.mark.parametrize("to", ["dinov2", "timm"])
def test_a_folder_in_the_place_of_the_file_to_write_is_refused(capsys, tmp_path, to):
    status, _, err = typed(capsys, f"export weights=x to={to} out={tmp_path}/a.safetensors")
    assert "There is no file x" in err
    (tmp_path / "a.safetensors").mkdir()
    status, _, err = typed(capsys, f"export weights=x to={to} out={tmp_path}/a.safetensors")
    assert status == 2
    assert "is a folder, but to=" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("export", "out, to and weights must be given"),
        ("export weights=x to=tim out=y", "There is no format to=tim. Did you mean 'timm'"),
        ("export weights=x to=timm ou=y", "there is no key 'ou'. Did you mean 'out'"),
        ("export weights=x to=hf out=y size=224", "size=224 is for to=onnx"),
        (
            "export weights=x to=onnx out=y size=large",
            "size: 'large' is not a whole number",
        ),
        ("export weights=nowhere.pth to=hf out=y", "There is no file nowhere.pth"),
        ("models identify", "Which file of weights?"),
        ("models identify x head=3", "there is no key 'head'. Did you mean 'heads'"),
        ("models identify nowhere.pth", "There is no file nowhere.pth"),
        ("models idntify x.pth", "Did you mean 'identify'"),
        ("models dinov2* heads=3", "heads=3: only dinokit models identify and join take settings"),
    ],
)
def test_what_was_typed_wrongly_is_answered_in_words(capsys, line, words):
    status, _, err = typed(capsys, line)
    assert status == (3 if "nowhere" in line else 2)
    assert words in err


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_the_other_library_prepares_photographs_as_dinokit_does(capsys, vit_with_photographs, tmp_path, to):
    weights, photographs = vit_with_photographs
    status, out, err = typed(
        capsys, f"export weights={weights} to={to} out={tmp_path / to} images={photographs}"
    )
    assert status == 0, err
    worst = re.search(
        r"of 2 images, prepared by dinokit and by that library: mean \S+, worst ([0-9.]+)\.", out
    )
    assert worst, out
    assert float(worst[1].rstrip(".")) > 0.999


@pytest.fixture
def vit_with_photographs(tmp_path):
    """The weights of a vit of 64 pixels, and a folder with the two photographs of scikit-learn."""
    section = {"name": "vit", "size": 64, "width": 64, "depth": 2, "heads": 1, "patch": 8, "layer_scale": 1.0}
    torch.manual_seed(0)
    save_backbone(tmp_path / "w.safetensors", registry.build("models", section).eval(), section)
    (tmp_path / "photographs").mkdir()
    for number, image in enumerate(load_sample_images().images):
        Image.fromarray(image).save(tmp_path / "photographs" / f"{number}.png")
    return tmp_path / "w.safetensors", tmp_path / "photographs"


KILLED = """
import os, sys
from pathlib import Path
real = Path.replace
def replace(self, target):
    moved = real(self, target)
    if Path(target).name == sys.argv[1] and ".aside." not in str(target):
        os.kill(os.getpid(), 9)
    return moved
Path.replace = replace
from dinokit.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checksums.json", "config.json"])
def test_an_export_killed_between_two_files_never_mixes_two_models(
    capsys, vit_with_photographs, tmp_path, name
):
    weights, photographs = vit_with_photographs
    line = f"export weights={weights} to=timm out={tmp_path / 'out'} images={photographs}"
    assert typed(capsys, line)[0] == 0
    assert typed(capsys, f"models identify {tmp_path / 'out'}")[0] == 0
    section = {"name": "vit", "size": 64, "width": 64, "depth": 2, "heads": 1, "patch": 8, "layer_scale": 1.0}
    save_backbone(weights, registry.build("models", {**section, "depth": 1}).eval(), {**section, "depth": 1})
    killed = subprocess.run([sys.executable, "-c", KILLED, name, *line.split()], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    status, _, err = typed(capsys, f"models identify {tmp_path / 'out'}")
    assert status == 2
    assert "does not match checksums.json, as when an export was killed" in err
    assert typed(capsys, line)[0] == 0
    assert typed(capsys, f"models identify {tmp_path / 'out'}")[0] == 0


def test_identify_compares_the_tensors_of_our_files_with_their_checksum(capsys, vit_with_photographs):
    weights, _ = vit_with_photographs
    assert "checksum     matches" in typed(capsys, f"models identify {weights}")[1]
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    status, _, err = typed(capsys, f"models identify {weights}")
    assert status == 3
    assert "do not match the checksum" in err
