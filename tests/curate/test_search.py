"""`dinokit search`: over features, and over the pool of a curation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.curate.image_sets import ImageSearch, ImageSet, contact_sheet
from dinokit.data.sources.folder import Config, build
from dinokit.features import extract_to
from dinokit.weights import load_backbone, save_backbone


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


def test_features_of_a_backbone_in_memory_are_searched_with_its_weights(photos, weights, capsys):
    store = extract_to(
        photos / "features", load_backbone(weights), build(Config(str(photos / "pool"), channels=3))
    )
    assert "weights" not in store.about
    words = f"index={store.out}", "k=1", f"out={photos / 'found.png'}", photos / "pool" / "07.png"
    status, _, error = run_search(capsys, *words)
    assert (status, "does not say where the weights are that made it" in error) == (2, True)
    status, output, error = run_search(capsys, f"weights={weights}", *words)
    assert status == 0, error
    assert output.splitlines()[2].split(maxsplit=2)[2] == str(photos / "pool/07.png")


def test_errors_name_the_cause(photos, weights, curate, capsys, tmp_path_factory):
    (photos / "folder.png").mkdir()
    curate(f"weights={weights}", f"pool.path={photos / 'pool'}", f"out={photos / 'out'}", "seed=1")
    broken, photo = photos / "pool" / "broken.jpg", photos / "pool" / "07.png"
    status, _, error = run_search(capsys, f"index={photos / 'out'}", broken)
    assert (status, "broken.jpg cannot be read" in error) == (3, True)
    status, _, error = run_search(capsys, f"index={photos / 'out'}", photo, photos / "none.jpg")
    assert (status, f"There is no image {photos / 'none.jpg'}." in error) == (3, True)
    status, _, error = run_search(capsys, f"index={tmp_path_factory.mktemp('empty')}", photo)
    assert (status, "has no features: give the folder that" in error) == (3, True)
    status, _, error = run_search(capsys, f"index={photos / 'out'}", photo, "out=found.csv")
    assert (status, "out is the picture, a .png" in error) == (2, True)
    status, _, error = run_search(capsys, f"index={photos / 'out'}", photo, f"out={photos / 'folder.png'}")
    assert (status, "folder.png is a folder" in error) == (3, True)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    torch.manual_seed(5)
    save_backbone(photos / "other.safetensors", registry.build("models", section), section)
    status, _, error = run_search(
        capsys, f"index={photos / 'out'}", f"weights={photos / 'other.safetensors'}", photo
    )
    assert (status, "not the weights that made the index" in error) == (2, True)


def test_embeddings_in_another_order_than_the_images_are_refused(photos, weights, tmp_path):
    files = sorted((photos / "seeds").iterdir())
    lists = {}
    for order in (1, -1):
        lists[order] = tmp_path / f"list{order}.txt"
        lists[order].write_text("".join(f"{file}\n" for file in files[::order]))
        section = {"name": "manifest", "path": str(lists[order])}
        extract_to(
            tmp_path / f"features{order}", load_backbone(weights), registry.build("data.sources", section)
        )
    section = {"name": "folder", "path": str(photos / "seeds")}
    assert len(ImageSet("pool", section, str(tmp_path / "features1"), "cls")) == len(files) > 1
    with pytest.raises(
        ValueError, match=r"in another order than the images: number 0 is '.*" + files[-1].name
    ):
        ImageSet("pool", section, str(tmp_path / "features-1"), "cls")
    names = tmp_path / "features-1" / "names.txt"
    names.write_text("".join(f"row {number}\n" for number in range(len(files))))  # nothing can be said
    ImageSet("pool", section, str(tmp_path / "features-1"), "cls")
