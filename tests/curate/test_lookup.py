"""`dinokit search`: over features, and over the pool of a curation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.curate.lookup import Lookup
from dinokit.curate.page import contact_sheet
from dinokit.weights import save_backbone


def answer(capsys, *words):
    status = main(["search", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_an_image_finds_itself_first_in_a_curation_and_in_features(heap, weights, curate, capsys):
    photo = heap / "heap" / "07.png"
    out = heap / "out"
    curate(f"weights={weights}", f"pool.path={heap / 'heap'}", f"out={out}")
    words = [f"weights={weights}", f"data.path={heap / 'heap'}", f"out={heap / 'features'}", "workers=0"]
    assert main(["extract", *words]) == 0
    capsys.readouterr()
    for index in (out, heap / "features"):
        sheet = heap / f"{index.name}.png"
        status, said, err = answer(
            capsys, f"index={index}", "k=5", f"sheet={sheet}", photo, heap / "seeds/02.png"
        )
        assert status == 0, err
        lines = said.splitlines()
        assert lines[0] == str(photo)
        rank, similarity, name = lines[2].split(maxsplit=2)
        assert (rank, name) == ("1", str(photo))
        assert float(similarity) == pytest.approx(1, abs=2e-3)
        assert json.loads(lines[-1])["images"] == 2
        with Image.open(sheet) as image:
            assert image.size == (6 * 192, 2 * (192 + 16))


def test_a_long_name_below_a_picture_stays_within_its_column():
    drawn = lambda caption: contact_sheet([(None, "x" * 200), (None, caption)], side=96)  # noqa: E731
    sheets = [np.asarray(drawn(caption)) for caption in ("", "a" * 200)]
    assert np.array_equal(sheets[0][:, :96], sheets[1][:, :96])
    assert (sheets[0][96:, 96:] == 255).all()
    assert (sheets[1][96:, 96:] < 255).any()


def test_where_copies_have_weights_of_their_own_those_are_searched(heap, weights, curate, capsys, tmp_path):
    section = {"name": "vit", "size": 32, "width": 16, "depth": 1, "heads": 2, "patch": 8}
    torch.manual_seed(6)
    save_backbone(tmp_path / "copies.safetensors", registry.build("models", section), section)
    two = f"weights={weights}", f"dedup.weights={tmp_path / 'copies.safetensors'}"
    curate(*two, f"pool.path={heap / 'heap'}", f"out={tmp_path / 'out'}")
    photo = heap / "heap" / "07.png"
    status, said, err = answer(capsys, f"index={tmp_path / 'out'}", "k=3", photo)
    assert status == 0, err
    assert float(said.splitlines()[2].split(maxsplit=2)[1]) == pytest.approx(1, abs=2e-3)
    opened = Lookup(tmp_path / "out")
    assert opened.weights == str(tmp_path / "copies.safetensors")
    assert opened.store["cls"].shape[1] == 16


def test_what_cannot_be_searched_is_said(heap, weights, curate, capsys, tmp_path_factory):
    curate(f"weights={weights}", f"pool.path={heap / 'heap'}", f"out={heap / 'out'}", "seed=1")
    broken, photo = heap / "heap" / "broken.jpg", heap / "heap" / "07.png"
    status, _, said = answer(capsys, f"index={heap / 'out'}", broken)
    assert (status, "broken.jpg cannot be read" in said) == (2, True)
    status, _, said = answer(capsys, f"index={heap / 'out'}", photo, heap / "none.jpg")
    assert (status, f"There is no image {heap / 'none.jpg'}." in said) == (2, True)
    status, _, said = answer(capsys, f"index={tmp_path_factory.mktemp('empty')}", photo)
    assert (status, "holds no features: give the folder that" in said) == (2, True)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    torch.manual_seed(5)
    save_backbone(heap / "other.safetensors", registry.build("models", section), section)
    status, _, said = answer(capsys, f"index={heap / 'out'}", f"weights={heap / 'other.safetensors'}", photo)
    assert (status, "not the weights that made the index" in said) == (2, True)
