"""`dinokit search`: over features, and over the pool of a curation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.curate.image_sets import ImageSearch, contact_sheet
from dinokit.weights import save_backbone


def run_search(capsys, *words):
    status = main(["search", *map(str, words)])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_an_image_finds_itself_first_in_a_curation_and_in_a_store(photos, weights, curate, capsys):
    photo = photos / "pool" / "07.png"
    out = photos / "out"
    curate(f"weights={weights}", f"pool.path={photos / 'pool'}", f"out={out}")
    words = [f"weights={weights}", f"data.path={photos / 'pool'}", f"out={photos / 'features'}", "workers=0"]
    assert main(["extract", *words]) == 0
    capsys.readouterr()
    for index in (out, photos / "features"):
        sheet = photos / f"{index.name}.png"
        status, output, err = run_search(
            capsys, f"index={index}", "k=5", f"out={sheet}", photo, photos / "seeds/02.png"
        )
        assert status == 0, err
        lines = output.splitlines()
        assert lines[0] == str(photo)
        rank, similarity, name = lines[2].split(maxsplit=2)
        assert (rank, name) == ("1", str(photo))
        assert float(similarity) == pytest.approx(1, abs=2e-3)
        assert json.loads(lines[-1])["images"] == 2
        with Image.open(sheet) as image:
            assert image.size == (6 * 192, 2 * (192 + 16))


def test_an_image_that_pillow_cannot_read_by_itself_is_searched_for(photos, weights, capsys):
    with Image.open(photos / "seeds/02.png") as image:
        np.save(photos / "array.npy", np.asarray(image))
    words = [f"weights={weights}", f"data.path={photos / 'seeds'}", f"out={photos / 'features'}", "workers=0"]
    assert main(["extract", *words]) == 0
    capsys.readouterr()
    sheet = photos / "found.png"
    status, output, err = run_search(
        capsys, f"index={photos / 'features'}", "k=2", f"out={sheet}", photos / "array.npy"
    )
    assert status == 0, err
    assert output.splitlines()[2].split(maxsplit=2)[2] == str(photos / "seeds/02.png")
    with Image.open(sheet) as image:
        query, found = (np.asarray(image)[:192, x : x + 192] for x in (0, 192))
    assert (query == found).all()


def test_a_long_name_below_a_picture_stays_within_its_column():
    drawn = lambda caption: contact_sheet([(None, "x" * 200), (None, caption)], side=96)  # noqa: E731
    sheets = [np.asarray(drawn(caption)) for caption in ("", "a" * 200)]
    assert np.array_equal(sheets[0][:, :96], sheets[1][:, :96])
    assert (sheets[0][96:, 96:] == 255).all()
    assert (sheets[1][96:, 96:] < 255).any()


def test_with_separate_weights_for_duplicates_their_index_is_searched(
    photos, weights, curate, capsys, tmp_path
):
    section = {"name": "vit", "size": 32, "width": 16, "depth": 1, "heads": 2, "patch": 8}
    torch.manual_seed(6)
    save_backbone(tmp_path / "copies.safetensors", registry.build("models", section), section)
    two = f"weights={weights}", f"dedup.weights={tmp_path / 'copies.safetensors'}"
    curate(*two, f"pool.path={photos / 'pool'}", f"out={tmp_path / 'out'}")
    photo = photos / "pool" / "07.png"
    status, output, err = run_search(
        capsys, f"index={tmp_path / 'out'}", f"out={tmp_path / 'sheet.png'}", "k=3", photo
    )
    assert status == 0, err
    assert float(output.splitlines()[2].split(maxsplit=2)[1]) == pytest.approx(1, abs=2e-3)
    opened = ImageSearch(tmp_path / "out")
    assert opened.weights == str(tmp_path / "copies.safetensors")
    assert opened.store["cls"].shape[1] == 16


def test_errors_name_the_cause(photos, weights, curate, capsys, tmp_path_factory):
    curate(f"weights={weights}", f"pool.path={photos / 'pool'}", f"out={photos / 'out'}", "seed=1")
    broken, photo = photos / "pool" / "broken.jpg", photos / "pool" / "07.png"
    status, _, error = run_search(capsys, f"index={photos / 'out'}", broken)
    assert (status, "broken.jpg cannot be read" in error) == (3, True)
    status, _, error = run_search(capsys, f"index={photos / 'out'}", photo, photos / "none.jpg")
    assert (status, f"There is no image {photos / 'none.jpg'}." in error) == (2, True)
    status, _, error = run_search(capsys, f"index={tmp_path_factory.mktemp('empty')}", photo)
    assert (status, "has no features: give the folder that" in error) == (2, True)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    torch.manual_seed(5)
    save_backbone(photos / "other.safetensors", registry.build("models", section), section)
    status, _, error = run_search(
        capsys, f"index={photos / 'out'}", f"weights={photos / 'other.safetensors'}", photo
    )
    assert (status, "not the weights that made the index" in error) == (2, True)
