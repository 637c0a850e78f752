"""Masks by example from Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.features import fingerprint
from dinokit.segment.by_example import ByExample, Trained
from dinokit.segment.encoder import Encoder
from dinokit.segment.in_context import InContextHead
from dinokit.segment.recipe import Context
from dinokit.segment.saved import SavedHead, save_head
from dinokit.weights.formats.native import save_backbone


def halves(left, right, size=(32, 48)):
    image = np.zeros((*size, 3), np.uint8)
    image[:, : size[1] // 2], image[:, size[1] // 2 :] = left, right
    return image


RED, BLUE, GREY = (220, 40, 40), (40, 40, 220), (120, 120, 120)


@pytest.fixture
def by_example(backbone):
    """Not trained: at first the head is the soft vote of similar patches, which colours are enough for."""
    torch.manual_seed(0)
    encoder = Encoder(backbone, 48)
    head = InContextHead(encoder.width, Context(width=48, heads=1)).eval()
    torch.nn.init.eye_(head.project.weight)
    torch.nn.init.zeros_(head.project.bias)
    return ByExample(Trained(head, encoder))


def test_what_is_marked_is_found_in_another_image(by_example):
    mask = np.zeros((32, 48), bool)
    mask[:, :24] = True
    by_example.set_examples([(halves(RED, BLUE), mask)])
    ids = by_example.predict(halves(BLUE, RED, (64, 32)))
    assert ids.shape == (64, 32)
    assert ids[:, 20:].mean() > 0.9
    assert ids[:, :12].mean() < 0.1


def test_several_things_and_several_examples(by_example):
    numbers = np.full((32, 48), 1)
    numbers[:, 24:] = 2
    other = np.zeros((32, 48), int)
    by_example.set_examples([(halves(RED, BLUE), numbers), (halves(GREY, GREY), other)])
    ids = by_example.predict(halves(BLUE, RED))
    assert (np.bincount(ids[:, :20].ravel()).argmax(), np.bincount(ids[:, 28:].ravel()).argmax()) == (2, 1)
    assert (by_example.predict(halves(GREY, GREY)) == 0).mean() > 0.9


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least one example"),
        ([(halves(RED, BLUE), np.ones((48, 32)))], "has 32 x 48 pixels, its image 48 x 32"),
        ([(halves(RED, BLUE), np.zeros((32, 48)))], "Nothing is marked"),
        ([(halves(RED, BLUE), np.arange(32 * 48).reshape(32, 48) % 200)], "A mask has the number 199"),
        ([(halves(RED, BLUE), np.full((32, 48), 10**12))], "A mask has the number 1000000000000"),
        ([(halves(RED, BLUE), np.full((32, 48), -1))], "A mask has the number -1"),
    ],
)
def test_wrong_examples_get_words(by_example, pairs, message):
    with pytest.raises(ValueError, match="no examples yet"):
        by_example.predict(halves(RED, BLUE))
    with pytest.raises(ValueError, match=message):
        by_example.set_examples(pairs)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_like_on_the_command_line(tmp_path, capsys):
    torch.manual_seed(0)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    vit = registry.build("models", section).eval()
    save_backbone(tmp_path / "vit.safetensors", vit, section, "")
    head = InContextHead(24, Context(width=16))
    save_head(
        tmp_path / "head.safetensors", head,
        SavedHead("in_context", {"width": 16}, 32, 1, fingerprint(vit), None, 0),
    )  # fmt: skip
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "photos/b.png", "example.png"):
        Image.fromarray(halves(RED, BLUE)).save(tmp_path / name)
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["segment", str(tmp_path / "photos"), f"weights={tmp_path}/vit.safetensors", f"head={tmp_path}"]
    like = f"like=[{tmp_path}/example.png,{tmp_path}/mask.png]"
    assert main([*words, "device=cpu", like, f"out={tmp_path}/out"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2
    assert pixels(tmp_path / "out" / "b.png").shape == (32, 48)
    assert set(np.unique(pixels(tmp_path / "out" / "b.png"))) <= {0, 255}
    mask[:16, :24] = 2
    mask[16:, :24] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert main([*words, "device=cpu", like, f"out={tmp_path}/two"]) == 0
    found = [pixels(tmp_path / "two" / f"{name}.png") for name in "ab"]
    assert all(set(np.unique(ids)) <= {0, 1, 2} for ids in found)  # also if one image has one of them alone
    assert any(ids.any() for ids in found)
    capsys.readouterr()
    assert main([*words, "device=cpu", "like=[a.png]"]) != 0
    assert "it is an image and its mask" in capsys.readouterr().err
    assert main([*words, "device=cpu", like, "box=[0,0,3,3]"]) != 0
    assert "like finds what is marked; box asks for one object" in capsys.readouterr().err
