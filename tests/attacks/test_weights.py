"""What an attacker did with files of weights, recipes and heads that others open: each test does the same."""

import json
import os
import shutil
import struct
import zipfile

import pytest
import torch

from dinokit.__main__ import main
from dinokit.commands import _card
from dinokit.config import registry
from dinokit.config.load import load_recipe, read_data_section, read_text_mapping, to_yaml
from dinokit.features import fingerprint
from dinokit.heads.classifier import load_classifier
from dinokit.segment.encoder import Encoder
from dinokit.segment.promptable import PromptableHead
from dinokit.segment.recipe import Head
from dinokit.segment.saved import load_head
from dinokit.weights import load_backbone
from dinokit.weights.checkpoint import open_checkpoint, write_tensors

VIT = {"name": "vit", "width": 16, "depth": 1, "heads": 1, "size": 16, "patch": 8}


def header(path, section, recipe="", **changes):
    shown = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, **changes}
    texts = {"dinokit": "0.1", "backbone": json.dumps(section), "input": json.dumps(shown), "recipe": recipe}
    write_tensors(path, {"a.weight": torch.zeros(3)}, texts)
    return path


def test_a_header_that_names_millions_of_blocks_is_refused_before_they_are_built(tmp_path):
    with pytest.raises(ValueError, match="it has depth=10000000, and the file has 1 tensors"):
        load_backbone(header(tmp_path / "x.safetensors", {**VIT, "depth": 10_000_000}))


def test_a_header_that_names_millions_of_channels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it has channels=10000000, and the file has 3 means"):
        load_backbone(header(tmp_path / "x.safetensors", {**VIT, "channels": 10_000_000}))


def test_a_header_that_names_a_large_model_of_timm_does_not_fill_the_memory(tmp_path):
    pytest.importorskip("timm")
    section = {"name": "timm_vit", "model": "vit_tiny_patch16_224", "size": 16 * 10**5}
    with pytest.raises(ValueError, match=r"do not fit .* asked for \(1, 10000000001, 192\)"):
        load_backbone(header(tmp_path / "x.safetensors", section))


@pytest.mark.parametrize(
    "change",
    [{"size": 10**9}, {"size": 0}, {"size": -5}, {"size": 1e400}, {"std": [0, 1, 1]}, {"mean": [1e400]}],
)
def test_a_header_with_an_input_that_no_image_has_is_damaged(change, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read: its header is damaged: `input`"):
        load_backbone(header(tmp_path / "x.safetensors", VIT, **change))


@pytest.mark.parametrize(
    "data",
    ["{name: hf, path: evil/pixels}", "{name: torchvision, path: x, dataset: CIFAR10, download: true}"],
)
def test_a_recipe_in_a_file_of_weights_downloads_nothing(data, tmp_path):
    with pytest.raises(ValueError, match=r"would be downloaded: give train\.path and test\.path yourself"):
        read_data_section(f"data: {data}", tmp_path / "x.safetensors")


def test_images_of_a_hub_anywhere_in_a_file_are_refused():
    for values in ({"train": {"name": "hf", "path": "evil/pixels"}}, {"many": [{"a": {"download": True}}]}):
        with pytest.raises(ValueError, match=r"x\.json names the images '.*', which would be downloaded"):
            registry.check_from_file(values, "x.json", "others")


def test_a_recipe_in_the_folder_of_a_run_imports_nothing_for_its_evaluations(tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "evil/images.py").write_text("class Config: ...")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = to_yaml(load_recipe("scenes_cpu"))
    assert recipe.count("    train: null\n") == 1
    recipe = recipe.replace("    train: null\n", "    train: {name: evil.images}\n")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=r"names the module 'evil\.images', and importing it would run"):
        load_recipe(tmp_path / "recipe.yaml", of_run=True)


@pytest.mark.parametrize("words", [["report", "RUN"], ["watch", "RUN"], ["viz", "crops", "weights=RUN"]])
def test_no_command_about_a_run_imports_what_only_its_recipe_names(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "evil/spread.py").write_text("class Config: ...")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = to_yaml(load_recipe("scenes_cpu")).replace("losses:\n", "losses:\n  evil.spread: {}\n", 1)
    assert "evil" in recipe
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main([word.replace("RUN", str(tmp_path)) for word in words]) in (2, 3)
    assert "names the module 'evil.spread'" in capsys.readouterr().err


def packed(path):
    """Write an archive that torch.load reads, with compressed records, and return its directory's place."""
    torch.save({"teacher": {"a.weight": torch.rand(4, 3)}}, path)
    with zipfile.ZipFile(path) as good:
        records = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in records.items():
            bomb.writestr(name, content + bytes(10**6 if name.endswith("data.pkl") else 0))
    return bomb.start_dir


def test_a_compressed_archive_is_no_file_of_torch_save(tmp_path):
    packed(tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth is a compressed archive"):
        load_backbone(tmp_path / "bomb.pth")


def with_an_unknown_version(data, directory):
    """zipfile does not read it, and torch does."""
    return data[: directory + 6] + struct.pack("<H", 99) + data[directory + 8 :]


def with_a_second_directory(data, directory):
    """zipfile reads the second one, in which nothing is compressed, and torch the first."""
    second, place = bytearray(data[directory:-22]), 0
    while place < len(second):
        struct.pack_into("<H", second, place + 10, zipfile.ZIP_STORED)
        place += 46 + sum(struct.unpack_from("<HHH", second, place + 28))
    return data[:-22] + bytes(second) + data[-22:]


@pytest.mark.parametrize("disguise", [with_an_unknown_version, with_a_second_directory])
def test_an_archive_that_zipfile_and_torch_read_differently_is_refused(disguise, tmp_path):
    path = tmp_path / "bomb.pth"
    directory = packed(path)
    path.write_bytes(disguise(path.read_bytes(), directory))
    assert "teacher" in torch.load(path, weights_only=True)  # which inflates the records
    with pytest.raises(ValueError, match=r"bomb\.pth .* is truncated or damaged"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("files", "says"),
    [(["../x.safetensors"], "lists '../x.safetensors', which is no file beside it"), ([], "lists none")],
)
def test_an_index_that_lists_files_elsewhere_is_refused_by_its_name(files, says, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"a{n}": name for n, name in enumerate(files)}}))
    with pytest.raises(ValueError, match=rf"{index} is no index .*: it {says}"):
        open_checkpoint(tmp_path)


def test_a_fifo_beside_weights_is_not_waited_for(tmp_path, weights):
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(weights, folder / "model.safetensors")
    os.mkfifo(folder / "config.json")
    with pytest.raises(OSError, match=r"config\.json is a FIFO"):
        load_backbone(folder)


def test_aliases_of_yaml_that_grow_without_end_are_refused_by_the_name_of_the_file(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"bomb\.yaml is not a recipe"):
        load_recipe(tmp_path / "bomb.yaml")


@pytest.mark.parametrize(
    "recipe",
    [
        "name: x\noptim: 5\nlosses: [a]\ndata: 5",
        "name: [a]\noptim: {steps: {a: 1}}\nlosses: {1: {}}",
        "a: &a [*a]",
        'name: "x`\\n# Read https://evil\\n"\nlosses: {"\\n# A": {}}',
    ],
)
def test_a_recipe_out_of_a_file_writes_no_heading_into_a_model_card(recipe):
    text = _card._training(read_text_mapping(recipe))
    assert not any(line.startswith("# ") for line in text.splitlines())


@pytest.mark.parametrize(
    "change",
    [{"classes": ["a"]}, {"classes": [1, 2]}, {"size": 10**9}, {"size": 1e400}, {"resize": -1}],
    ids=str,
)
def test_a_classifier_with_other_values_is_refused_by_its_name(change, tmp_path, weights):
    backbone = load_backbone(weights)
    about = {"classes": ["a", "b"], "blocks": 1, "pool": False, "resize": 18, "size": 16, "several": False}
    about |= {"fingerprint": fingerprint(backbone)} | change
    tensors = {"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}
    write_tensors(tmp_path / "c.safetensors", tensors, {"dinokit_classifier": json.dumps(about)})
    with pytest.raises(ValueError, match=r"c\.safetensors is no classifier"):
        load_classifier(tmp_path / "c.safetensors", backbone)


def head_with(path, backbone, tensors, **change):
    about = {
        "kind": "promptable", "config": {"width": 64, "depth": 2, **change}, "size": 16, "layers": 1,
        "fingerprint": fingerprint(backbone), "objects": None, "steps": 1,
    }  # fmt: skip
    write_tensors(path, tensors, {"dinokit_head": json.dumps(about)})
    return path


@pytest.mark.parametrize("change", [{"depth": 10**7}, {"width": 10**6}, {"hidden": 0}], ids=str)
def test_a_head_for_masks_with_other_sizes_is_refused_before_it_is_built(change, tmp_path, weights):
    backbone = load_backbone(weights)
    tensors = PromptableHead(
        Encoder(backbone, 16, 1).width, Head(width=64, depth=2), backbone.channels
    ).state_dict()
    assert load_head(head_with(tmp_path / "good.safetensors", backbone, tensors), backbone, "promptable")
    with pytest.raises(ValueError, match=r"h\.safetensors is no head"):
        load_head(head_with(tmp_path / "h.safetensors", backbone, tensors, **change), backbone, "promptable")
