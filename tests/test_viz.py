"""Pictures: colours of principal components, neighbours against brute force, crops as a step sees them."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit import viz
from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.config.load import load_recipe

G = viz.GAP


def tile(sheet, row, column, size):
    top, left = G + row * (size + G), G + column * (size + G)
    return sheet[top : top + size, left : left + size]


def test_a_grid_has_its_pictures_on_white():
    pictures = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = viz.grid([pictures[:2], pictures[2:]])
    assert sheet.shape == (2 * (4 + G) + G, 2 * (4 + G) + G, 3)
    assert (tile(sheet, 0, 1, 4) == 20).all()
    assert (tile(sheet, 1, 0, 4) == 30).all()
    assert (tile(sheet, 1, 1, 4) == 255).all()


def test_colours_of_patches_are_their_principal_components():
    torch.manual_seed(0)
    where = torch.rand(3, 4, 5, 3)  # three factors of different strength, each patch has its own
    mixing = torch.linalg.qr(torch.randn(16, 3))[0] * torch.tensor([9.0, 3.0, 1.0])
    pictures = viz.component_colours(where @ mixing.T + 5.0)
    for picture, truth in zip(pictures, where, strict=True):
        assert picture.dtype == np.uint8
        for channel in range(3):
            correlation = np.corrcoef(picture[..., channel].ravel(), truth[..., channel].ravel())[0, 1]
            assert abs(correlation) > 0.8


def test_the_colour_of_a_patch_is_the_same_in_every_image():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 4, 8)
    features[1] = features[0].flip(0)
    a, b = viz.component_colours(features)
    assert (a == b[::-1]).all()


def planted() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Masks (3, 6, 6) of objects, and features whose strongest direction is that of the objects."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    masks[0, 2:5, 1:4] = masks[1, 1:3, 2:5] = masks[2, 3:, 3:5] = True
    direction, others = torch.randn(12, generator=generator), torch.randn(3, 6, 6, 12, generator=generator)
    return masks, list(0.3 * others + 2.0 * masks[..., None] * direction)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_of_the_first_component_that_is_rare_at_edges(sign):
    masks, features = planted()
    assert torch.equal(torch.stack(viz.foreground_masks([sign * x for x in features])), masks)


def test_a_picture_of_the_foreground_is_black_elsewhere():
    masks, features = planted()
    for mask, picture in zip(masks, viz.component_colours(features, foreground=True), strict=True):
        assert not picture[~mask.numpy()].any()
        assert picture[mask.numpy()].any(axis=1).mean() > 0.8


def test_pictures_of_images_have_the_size_of_the_fitted_image(drawn):
    vit = drawn(patch=14, size=56)
    images = [Image.new("RGB", (120, 60), colour) for colour in ("red", "blue")]
    assert [p.shape for p in viz.pca(vit, images, size=112)] == [(56, 112, 3)] * 2
    assert [[p.shape for p in heads] for heads in viz.attention(vit, images, size=112)] == [
        [(56, 112, 3)] * vit.heads
    ] * 2
    assert viz.fit(vit, images[0]).shape == (3, 112, 224)


def test_similarity_is_the_cosine_with_the_patch_at_a_point(drawn):
    vit, rng = drawn(patch=14, size=56), np.random.default_rng(0)
    images = [rng.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(2)]
    pictures = viz.similarity(vit, images, point=(0.3, 0.9), size=56)
    x = torch.nn.functional.normalize(
        torch.stack(viz.patch_features(vit, [viz.fit(vit, i, 56) for i in images])), dim=3
    )
    cosines = (x @ x[0, 3, 1]).clamp(0, 1)  # row 3 of 4, column 1 of 4
    for picture, expected in zip(pictures, cosines, strict=True):
        assert (picture[::14, ::14] == viz.heat(expected)).all()
    assert (pictures[0][3 * 14, 14] == viz.heat(torch.ones(1, 1))[0, 0]).all()


def test_a_chart_is_an_svg_in_the_colour_of_the_page_and_without_an_address_to_load():
    svg = viz.line_chart([viz.Line([0, 10, 20], [1.0, 3.0, 2.0])], marks=[5])
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "currentColor" in svg
    assert "#000000" not in svg
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith(("href", "src"))]
    assert links
    assert all(link.startswith("#") for link in links)
    assert root.find(".//{*}style") is None  # it would hold for the whole page


def test_neighbours_are_the_most_similar_others_and_framed_by_class():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 10, 10, 3), dtype=np.uint8)
    features = torch.from_numpy(rng.standard_normal((12, 5)))
    labels = (np.arange(12) % 2).tolist()
    sheet = viz.neighbours(images, features, [3, 7], k=4, labels=labels)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    inner = slice(viz.FRAME, -viz.FRAME)
    for row, query in enumerate([3, 7]):
        ranked = sorted((i for i in range(12) if i != query), key=lambda i: -float(unit[i] @ unit[query]))
        assert (tile(sheet, row, 0, 10) == images[query]).all()
        for column, index in enumerate(ranked[:4], start=1):
            found = tile(sheet, row, column, 10)
            assert (found[inner, inner] == images[index][inner, inner]).all()
            assert tuple(found[0, 0]) == (viz.SAME if labels[index] == labels[query] else viz.OTHER)


@pytest.mark.parametrize("masked", [True, False])
def test_crops_are_those_of_a_step_with_masked_patches_grey(masked):
    changes = ["data.size=32", "crops.globals.size=32", "crops.locals.count=2", "crops.locals.size=16"]
    changes += ["crops.locals.scale=[0.1,0.3]", "crops.jitter=0", "crops.gray=0"]
    changes += [] if masked else ["masks=null", "losses.ibot=null", "heads.patch=null"]
    recipe = load_recipe("scenes_cpu", changes)
    source = registry.build("data.sources", recipe.data)
    sheet = viz.crops(recipe, source, images=3, tile=32)
    across = (sheet.shape[1] - G) // (32 + G)
    assert across == (2 + 2 + 2 if masked else 2 + 2)
    assert (sheet.shape[0] - G) // (32 + G) == 3
    if masked:
        plain, hidden = tile(sheet, 0, 0, 32), tile(sheet, 0, 2, 32)
        grey = (hidden == 128).all(axis=2)
        assert 0.05 < grey.mean() < 0.6
        assert (plain[~grey] == hidden[~grey]).all()
        cells = grey.reshape(4, 8, 4, 8).mean(axis=(1, 3))
        assert set(np.unique(cells)) <= {0.0, 1.0}
    assert len(np.unique(tile(sheet, 2, across - 1, 32))) > 20


def test_a_figure_is_a_png_with_all_pictures(tmp_path):
    red, blue = (np.full((40, 80, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    viz.figure({"one": red, "two": blue}, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(axis=1).mean() > 0.25


def test_a_cross_marks_a_point_and_a_picture_stands_on_a_white_square():
    picture = viz.marked(np.zeros((24, 48, 3), np.uint8), (0.5, 1.0))
    assert tuple(picture[23, 24]) == viz.OTHER
    assert not picture[:20].any()
    square = viz.boxed(picture, 96)
    assert square.shape == (96, 96, 3)
    assert (square[:24] == 255).all()
    assert not square[30, 10].any()


def size_of_file(path):
    with Image.open(path) as image:
        return image.size


def test_the_command_draws_every_picture_of_files_folders_and_the_images_of_a_run(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    small = [
        "backbone.width=32",
        "backbone.depth=1",
        "backbone.size=32",
        "crops.globals.size=32",
        "evals=null",
    ]
    small += ["data.size=32", "data.count=20", "data.test_count=4", "optim.batch=4", "optim.steps=1"]
    small += ["optim.warmup=0", "run.workers=0", "run.device=cpu", "run.report=false", "run.out=run"]
    assert main(["train", "scenes_cpu", *small]) == 0
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 60 + 8 * i, 3), np.uint8)).save(f"photos/{i}.png")
    words = ["weights=run", "device=cpu", "count=3"]
    widths = {"pca": 3, "attention": 3, "similarity": 2}
    for kind, columns in widths.items():
        assert main(["viz", kind, *words, "photos"]) == 0
        size = size_of_file(f"{kind}.png")
        assert size == (columns * (224 + G) + G, 3 * (224 + G) + G)
    assert main(["viz", "pca", *words, "photos/0.png", "out=one.png"]) == 0
    assert size_of_file("one.png")[1] == 224 + 2 * G
    assert main(["viz", "neighbours", "weights=run", "device=cpu", "queries=2", "k=3"]) == 0  # of the run
    assert size_of_file("neighbours.png") == (4 * (112 + G) + G, 2 * (112 + G) + G)
    assert main(["viz", "crops", *words]) == 0
    assert size_of_file("crops.png")[1] == 3 * (96 + G) + G
    capsys.readouterr()
    assert main(["viz", "pcaa", *words]) == 2
    assert "'pca'" in capsys.readouterr().err
    assert main(["viz", "similarity", *words, "point=[2,0]"]) == 2
    assert "shares of the image" in capsys.readouterr().err
