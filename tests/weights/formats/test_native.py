"""A backbone file against the format itself: headers are read by hand, broken files are made byte by byte."""

import json
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from dinokit import __version__
from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.models import Input
from dinokit.weights import describe, load_backbone, save_backbone

VIT = {"name": "vit", "width": 32, "depth": 2, "heads": 2, "patch": 8, "size": 32}
TOY = """
from dataclasses import dataclass
from torch import nn
from dinokit.models import Backbone, Input
@dataclass
class Config:
    channels: int = 3
    grid: tuple[int, int] = (4, 4)
class Toy(Backbone):
    width, patch, blocks = 2, 4, ()
    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.grid, self.channels, self.input = cfg.grid, cfg.channels, Input(8, (0.5,) * 3, (0.5,) * 3)
build = Toy
"""
RECIPE = "name: small\nbackbone: {name: vit}\n"


@pytest.fixture
def vit():
    torch.manual_seed(0)
    backbone = registry.build("models", VIT)
    backbone.input = Input(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return backbone


@pytest.fixture
def saved(vit, tmp_path):
    path = tmp_path / "run" / "teacher.safetensors"
    save_backbone(path, vit, VIT, RECIPE)
    return path


def split(path):
    """The header as JSON and the bytes after it, as the format lays them out."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def damage(path, **changes):
    """The file again with other texts in its metadata."""
    header, rest = split(path)
    header["__metadata__"] |= changes
    path.write_bytes(joined(header, rest))


def test_a_backbone_is_loaded_from_its_file_only(vit, saved):
    back = load_backbone(saved)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(back([x], [None])[0].cls, vit.eval()([x], [None])[0].cls)
    assert back.input == Input(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_loaded_backbone_is_frozen_and_in_eval_mode(saved):
    back = load_backbone(saved)
    assert not any(module.training for module in back.modules())
    assert not any(parameter.requires_grad for parameter in back.parameters())


def test_the_file_is_plain_safetensors_that_other_readers_open(vit, saved):
    tensors = load_file(saved)
    assert set(tensors) == set(vit.state_dict())
    assert all(torch.equal(tensors[name], value) for name, value in vit.state_dict().items())


def test_the_header_contains_version_architecture_input_and_recipe(saved):
    header, _ = split(saved)
    metadata = header["__metadata__"]
    assert metadata["dinokit"] == __version__
    assert json.loads(metadata["backbone"]) == VIT
    assert json.loads(metadata["input"]) == {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert metadata["recipe"] == RECIPE


def test_a_run_folder_means_the_weights_in_it(saved):
    assert describe(saved.parent) == describe(saved)
    assert load_backbone(saved.parent).width == 32


def test_describe_reads_no_tensor(vit, saved):
    header, rest = split(saved)
    before = describe(saved)
    saved.write_bytes(joined(header, b"\xff" * len(rest)))
    assert describe(saved) == before
    assert before["tensors"] == {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    assert before["backbone"] == VIT
    assert before["recipe"] == RECIPE


def test_a_tuple_in_the_section_is_a_tuple_again(tmp_path, monkeypatch):
    package = tmp_path / "my_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    section = {"name": "my_models.toy", "channels": 3, "grid": (2, 5)}
    save_backbone(tmp_path / "toy.safetensors", registry.build("models", section), section)
    assert load_backbone(tmp_path / "toy.safetensors").grid == (2, 5)


@pytest.mark.parametrize("names", ["the backbone", "the data", "the environment"])
@pytest.mark.parametrize("command", ["load", "eval", "train", "extract"])
def test_a_file_of_weights_decides_neither_what_is_imported_nor_what_is_read(
    tmp_path, vit, monkeypatch, capsys, names, command
):
    package = tmp_path / "evilpkg"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (package / "model.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SECRET", "s3cret")
    data = {
        "the data": "{name: evilpkg.model}",
        "the environment": "{name: folder, path: '${oc.env:SECRET}'}",
    }
    section = {**VIT, "name": "evilpkg.model"} if names == "the backbone" else VIT
    file = tmp_path / "w.safetensors"
    save_backbone(file, vit, section, f"data: {data.get(names, '{name: folder, path: x}')}")
    (tmp_path / "r.yaml").write_text(
        f"{{backbone: {{weights: {file}}}, losses: {{dino: {{}}}}, data: {{name: folder, path: {tmp_path}}},"
        f" optim: {{steps: 1, batch: 4, lr: 1e-3}}, run: {{out: {tmp_path / 'out'}}}}}"
    )
    with pytest.raises(ValueError, match="evilpkg") if names == "the backbone" else nullcontext():
        load_backbone(file)
    words = {
        "eval": ["eval", "drift", f"weights={file}", "device=cpu"],
        "train": ["train", str(tmp_path / "r.yaml")],
        "extract": ["extract", f"weights={file}", f"data.path={package}", f"out={tmp_path / 'out'}"],
    }
    if command in words:
        assert main(words[command]) in (2, 3)
        err = capsys.readouterr().err
        expected = "--trust=evilpkg" if names != "the environment" else "not resolved out of a file"
        if names == "the backbone" or command == "eval":
            assert expected in err, err
        assert "s3cret" not in err
    assert not (tmp_path / "ran").exists()


def test_a_package_that_the_caller_trusts_is_imported(tmp_path, vit, monkeypatch):
    (tmp_path / "goodpkg").mkdir()
    (tmp_path / "goodpkg" / "__init__.py").touch()
    (tmp_path / "goodpkg" / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    section = {"name": "goodpkg.toy", "channels": 3, "grid": [2, 5]}
    code = (
        "from dinokit.config import registry\nfrom dinokit.weights.formats.native import save_backbone\n"
        f"section = {section}\nsave_backbone('toy.safetensors', registry.build('models', section), section)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)
    with pytest.raises(ValueError, match="--trust=goodpkg"):
        load_backbone(tmp_path / "toy.safetensors")
    assert load_backbone(tmp_path / "toy.safetensors", trust=["goodpkg"]).grid == (2, 5)


def test_saving_again_replaces_the_file_whole(vit, saved):
    inode = saved.stat().st_ino
    with torch.no_grad():
        vit.cls_token.fill_(7)
    save_backbone(saved, vit, VIT)
    assert saved.stat().st_ino != inode
    assert (load_backbone(saved).cls_token == 7).all()
    assert [p.name for p in saved.parent.iterdir()] == ["teacher.safetensors"]


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(saved):
    plain = saved.parent / "plain"
    plain.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_section_without_a_name_is_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="needs its `name`"):
        save_backbone(tmp_path / "x.safetensors", vit, {"width": 32})
    assert not list(tmp_path.iterdir())


def test_a_misspelt_file_gets_a_suggestion(saved):
    with pytest.raises(LookupError, match=r"Did you mean 'teacher.safetensors'"):
        load_backbone(saved.parent / "techer.safetensor")
    with pytest.raises(LookupError, match="no folder"):
        load_backbone(saved.parent / "nowhere" / "teacher.safetensors")


def test_a_folder_without_weights_is_refused_with_the_missing_file(tmp_path, saved):
    with pytest.raises(LookupError, match=r"no teacher.safetensors in the folder"):
        load_backbone(tmp_path)
    saved.rename(tmp_path / "best.safetensors")
    with pytest.raises(LookupError, match=r"Give the path of one that is: best.safetensors"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x02" + b"\0" * 7 + b"{]",
        b"\x0a" + b"\0" * 7 + b'{"a": 1} }',
    ],
)
def test_other_bytes_than_safetensors_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"x.safetensors is (an empty|not a safetensors|truncated or damaged)"
    ):
        describe(path)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_a_file_cut_off_anywhere_is_reported_as_truncated(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=r"is truncated or damaged: .* Copy or download it again"):
        load_backbone(saved)


def test_bytes_after_the_end_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_backbone(saved)


def test_tensors_that_do_not_fit_are_named_with_both_shapes(saved, vit):
    section = {**VIT, "width": 64}
    save_backbone(saved, vit, section)
    with pytest.raises(
        ValueError, match=r"cls_token: asked for \(1, 1, 64\), found \(1, 1, 32\).*and \d+ more"
    ):
        load_backbone(saved)


def test_absent_and_surplus_tensors_are_named(saved, vit):
    save_backbone(saved, vit, {**VIT, "mask_token": False})
    with pytest.raises(ValueError, match=r"mask_token: not asked for, found \(1, 32\)"):
        load_backbone(saved)
    save_backbone(saved, vit, {**VIT, "registers": 4})
    with pytest.raises(ValueError, match=r"register_tokens: asked for \(1, 4, 32\), absent"):
        load_backbone(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "{"}, "its header is damaged: `backbone`"),
        ({"backbone": "[1, 2]"}, "its header is damaged: `backbone`"),
        ({"input": '{"size": 32}'}, "its header is damaged: `input`"),
        (
            {"input": '{"size": 32, "mean": [0.5], "std": [0.5]}'},
            "1 means and 1 deviations, but the backbone takes 3",
        ),
        (
            {"backbone": '{"name": "vit", "wide": 3}', "dinokit": "9.9"},
            "written by dinokit 9.9, cannot be rebuilt.*wide",
        ),
        ({"backbone": '{"name": "../../evil"}'}, "which is no name of a backbone"),
        ({"backbone": '{"name": "/tmp/evil"}'}, "which is no name of a backbone"),
    ],
)
def test_a_damaged_header_is_refused(saved, changes, words):
    damage(saved, **changes)
    with pytest.raises(ValueError, match=words):
        load_backbone(saved)


def test_a_file_of_an_unknown_backbone_lists_the_registered_ones(saved):
    damage(saved, backbone='{"name": "vitt"}')
    with pytest.raises(
        LookupError, match=r"'vitt' is not in the registry 'models', which has:.*Did you mean 'vit'"
    ):
        load_backbone(saved)
