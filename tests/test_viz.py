"""Pictures: colours of principal components, neighbours against brute force, crops as a step sees them."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

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


def test_a_picture_of_another_shape_is_fitted_into_its_place():
    wide, first = np.full((2, 8, 3), 20, np.uint8), np.full((4, 4, 3), 10, np.uint8)
    place = tile(viz.grid([[first, wide]]), 0, 1, 4)
    assert (place[1:2] == 20).all()  # 8 x 2 pixels become 4 x 1, in the middle
    assert (np.delete(place, 1, axis=0) == 255).all()


def colours(features, foreground=False):
    return viz.Basis.fit(features).colours(features, foreground)


def test_colours_of_patches_are_their_principal_components():
    torch.manual_seed(0)
    where = torch.rand(3, 4, 5, 3)  # three factors of different strength, each patch has its own
    mixing = torch.linalg.qr(torch.randn(16, 3))[0] * torch.tensor([9.0, 3.0, 1.0])
    pictures = colours(where @ mixing.T + 5.0)
    for picture, truth in zip(pictures, where, strict=True):
        assert picture.dtype == np.uint8
        for channel in range(3):
            correlation = np.corrcoef(picture[..., channel].ravel(), truth[..., channel].ravel())[0, 1]
            assert abs(correlation) > 0.8


def test_the_colour_of_a_patch_is_the_same_in_every_image():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 4, 8)
    features[1] = features[0].flip(0)
    a, b = colours(features)
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
    turned = [sign * x for x in features]
    basis = viz.Basis.fit(turned)
    assert torch.equal(torch.stack(basis.masks(turned)), masks)


def test_a_picture_of_the_foreground_is_black_elsewhere():
    masks, features = planted()
    for mask, picture in zip(masks, colours(features, foreground=True), strict=True):
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
    cosines = x @ x[0, 3, 1]  # row 3 of 4, column 1 of 4
    expected = (cosines - cosines.min()) / (1 - cosines.min())  # of both images together
    for picture, shares in zip(pictures, expected, strict=True):
        assert np.abs(picture[::14, ::14].astype(int) - viz.heat(shares)).max() <= 1
    assert (pictures[0][3 * 14, 14] == viz.heat(torch.ones(1, 1))[0, 0]).all()
    assert sum(int((picture == viz.heat(torch.zeros(1, 1))[0, 0]).all(2).any()) for picture in pictures) == 1


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


def test_a_basis_has_the_principal_axes_and_colours_other_images_by_the_same_rule(tmp_path):
    features = list(
        torch.randn(3, 6, 6, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 2
    )
    basis = viz.Basis.fit(features)
    oracle = PCA(3).fit(torch.stack(features).flatten(0, 2).double().numpy())
    cosines = np.abs(oracle.components_ @ basis.every.axes.double().numpy())
    assert np.allclose(cosines, np.eye(3), atol=1e-4)
    other = torch.randn(4, 5, 12) * 3
    colours = basis.colours([other])[0]
    for row in range(4):
        for column in range(5):
            for k in range(3):
                place = sum(
                    (float(other[row, column, d]) - float(basis.every.mean[d]))
                    * float(basis.every.axes[d, k])
                    for d in range(12)
                )
                low, high = float(basis.every.low[k]), float(basis.every.high[k])
                assert (
                    abs(int(colours[row, column, k]) - 255 * min(max((place - low) / (high - low), 0), 1))
                    <= 0.51
                )
    basis.save(tmp_path / "basis.safetensors")
    again = viz.Basis.load(tmp_path / "basis.safetensors", 12)
    for foreground in (False, True):
        assert (again.colours([other], foreground)[0] == basis.colours([other], foreground)[0]).all()


def test_a_file_that_is_no_basis_or_one_of_another_backbone_is_named(tmp_path):
    viz.Basis.fit(planted()[1]).save(tmp_path / "basis.safetensors")
    with pytest.raises(ValueError, match=r"another width than 8.*another backbone"):
        viz.Basis.load(tmp_path / "basis.safetensors", 8)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "basis.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken.safetensors has no principal components"):
        viz.Basis.load(tmp_path / "broken.safetensors", 12)


def test_a_foreground_is_drawn_where_it_consists_of_areas():
    _, features = planted()
    noise = list(torch.randn(3, 6, 6, 12, generator=torch.Generator().manual_seed(1)))
    assert viz.Basis.fit(features).separates(features)
    assert not viz.Basis.fit(noise).separates(noise)


def test_the_contrast_of_colours_falls_where_a_basis_no_longer_fits():
    features = planted()[1]
    basis = viz.Basis.fit(features)
    shares = torch.from_numpy(np.stack(basis.colours(features)).reshape(-1, 3) / 255.0)
    assert basis.contrast(features) == pytest.approx(float(shares.std(dim=0).mean()), abs=0.01)
    assert basis.contrast([x + 100 for x in features]) < 0.1 < basis.contrast(features)
    assert basis.contrast([x / 50 for x in features]) < 0.1


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_a_map_keeps_similar_images_together(method):
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.linalg.qr(torch.randn(16, 3, generator=generator))[0].T
    classes = torch.arange(60) % 3
    features = centres[classes] + 0.3 * torch.randn(60, 16, generator=generator)
    points = viz.map_points(features, method)
    assert points.shape == (60, 2)
    assert (points.min(axis=0) == 0).all()
    assert (points.max(axis=0) == 1).all()
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, 9)
    assert (classes[distances.argmin(axis=1)] == classes).all()
    assert (viz.map_points(features, method) == points).all()


def test_the_components_of_a_map_are_those_of_scikit_learn():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    unit = features / features.norm(dim=1, keepdim=True)
    oracle = PCA(2).fit_transform(unit.double().numpy())
    for axis in range(2):
        correlation = np.corrcoef(oracle[:, axis], viz.map_points(features, "pca")[:, axis])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_images_that_are_all_alike_have_a_map(method):
    assert (viz.map_points(torch.ones(9, 4), method) == 0.5).all()
    assert np.isfinite(viz.map_points(torch.randn(2, 4), method)).all()


def test_thumbnails_on_a_map_do_not_cover_each_other_and_the_others_are_dots():
    points = np.random.default_rng(0).random((80, 2)).astype(np.float32)
    shown = viz.spaced(points, 0.1, 0.2)
    corners = [(float(x) * 0.9, float(y) * 0.8) for x, y in points]

    def cover(a, b):
        return abs(corners[a][0] - corners[b][0]) < 0.1 and abs(corners[a][1] - corners[b][1]) < 0.2

    assert not [(a, b) for a in shown for b in shown if a < b and cover(a, b)]
    assert all(any(cover(i, j) for j in shown if j < i) for i in set(range(80)) - set(shown))
    thumbnails = np.random.default_rng(1).integers(0, 200, (3, 20, 20, 3), dtype=np.uint8)
    points = np.array([[0, 0], [0, 0.05], [1, 1]], np.float32)
    sheet = viz.map_picture(thumbnails, points, [0, 1, -1], (120, 90))
    colours, inner = viz.class_colours(2), slice(viz.FRAME, -viz.FRAME)
    assert (sheet[:20, :20][inner, inner] == thumbnails[0][inner, inner]).all()
    assert tuple(sheet[0, 0]) == colours[0]
    assert (sheet[-20:, -20:] == thumbnails[2]).all()  # without a class no frame
    assert (sheet[30:60] == 255).all()
    alone = viz.map_picture(thumbnails[:2], np.array([[0.3, 0.3], [0.3, 0.5]], np.float32), [0, 1], (120, 90))
    assert (alone == colours[1]).all(axis=2).any()


def test_classes_have_different_colours():
    for count in (1, 10, 20, 60):
        assert len(set(viz.class_colours(count))) == count


def gif(path, colours, milliseconds=50):
    first, *rest = [Image.new("RGB", (40, 24), colour) for colour in colours]
    first.save(path, save_all=True, append_images=rest, duration=milliseconds)


def test_frames_of_a_video_are_read_at_even_steps(tmp_path):
    colours = [(30 * i, 0, 255 - 30 * i) for i in range(8)]
    gif(tmp_path / "clip.gif", colours)
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    assert [viz.is_animated(tmp_path / name) for name in ("clip.gif", "one.png")] == [True, False]
    frames, fps = viz.read_frames(tmp_path / "clip.gif", 3, 100)
    assert [frame.getpixel((3, 3)) for frame in frames] == colours
    assert fps == pytest.approx(20)
    frames, fps = viz.read_frames(tmp_path / "clip.gif", 3, 3)
    assert [frame.getpixel((3, 3)) for frame in frames] == [colours[0], colours[4], colours[7]]
    assert fps == pytest.approx(3 / 0.4)  # the clip takes as long as before


def test_a_damaged_animation_names_its_frame(tmp_path):
    gif(tmp_path / "clip.gif", [(i, 255 - i, i * i % 256) for i in range(0, 200, 10)])
    data = (tmp_path / "clip.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(data[: len(data) // 2])
    assert viz.is_animated(tmp_path / "cut.gif")
    with pytest.raises(ValueError, match=r"cut.gif cannot be read: frame \d+ of \d+"):
        viz.read_frames(tmp_path / "cut.gif", 3, 100)


def test_the_frames_of_a_webp_have_their_own_times(tmp_path):
    first, *rest = [Image.new("RGB", (40, 24), (50 * i, 0, 0)) for i in range(4)]
    path = tmp_path / "clip.webp"
    first.save(path, save_all=True, append_images=rest, duration=[100, 200, 300, 400], lossless=True)
    for count in (4, 2):
        frames, fps = viz.read_frames(path, 3, count)
        assert fps == pytest.approx(count / 1.0)  # the whole clip takes one second
    assert [frame.getpixel((3, 3))[0] for frame in frames] == [0, 150]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_has_its_frames_and_their_time(tmp_path, suffix):
    frames = [np.full((16, 20, 3), value, np.uint8) for value in (10, 120, 250)]
    viz.write_animation(tmp_path / f"x.{suffix}", frames, fps=4)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.n_frames == 3
        for number, frame in enumerate(frames):
            image.seek(number)
            image.load()
            assert abs(int(np.asarray(image.convert("RGB"))[5, 5, 0]) - int(frame[5, 5, 0])) <= 4
            assert image.info["duration"] == 250
    with pytest.raises(ValueError, match=r"NAME.webp"):
        viz.write_animation(tmp_path / "x.jpg", frames, fps=4)


def test_a_number_that_stays_is_drawn_as_a_line_that_does():
    svg = viz.line_chart([viz.Line([1, 2, 3], [0.4000000059604645, 0.3999999761581421, 0.4], "red")])
    assert "0.4000000" not in svg
    assert "0.40" in svg


def size_of_file(path):
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder with a run and three photos."""
    place = tmp_path_factory.mktemp("viz")
    small = ["backbone.width=32", "backbone.depth=1", "backbone.size=32", "crops.globals.size=32"]
    small += ["data.size=32", "data.count=20", "data.test_count=4", "optim.batch=4", "optim.steps=1"]
    small += ["optim.warmup=0", "run.workers=0", "run.device=cpu", "run.report=false", "evals=null"]
    assert main(["train", "scenes_cpu", *small, f"run.out={place / 'run'}"]) == 0
    (place / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (40, 60 + 8 * i, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"photos/{i}.png")
    return place


WORDS = ["weights=run", "device=cpu"]


def test_the_command_draws_every_picture_of_files_folders_and_the_images_of_a_run(
    tiny_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tiny_run)
    widths = {"attention": 3, "similarity": 2}
    for kind, columns in widths.items():
        assert main(["viz", kind, *WORDS, "photos", f"out={tmp_path}/{kind}.png"]) == 0
        assert size_of_file(tmp_path / f"{kind}.png") == (columns * (224 + G) + G, 3 * (224 + G) + G)
    assert main(["viz", "pca", *WORDS, "photos/0.png", f"out={tmp_path}/one.png"]) == 0
    assert size_of_file(tmp_path / "one.png")[1] == 224 + 2 * G
    words = ["viz", "neighbours", *WORDS, "queries=2", "k=3", f"out={tmp_path}/neighbours.png"]
    assert main(words) == 0  # of the run
    assert size_of_file(tmp_path / "neighbours.png") == (4 * (112 + G) + G, 2 * (112 + G) + G)
    for images in ([], ["photos"]):
        assert main(["viz", "map", *WORDS, *images, f"out={tmp_path}/map.png"]) == 0
        assert size_of_file(tmp_path / "map.png") == (1200, 900)
    assert main(["viz", "crops", *WORDS, "count=3", f"out={tmp_path}/crops.png"]) == 0
    assert size_of_file(tmp_path / "crops.png")[1] == 3 * (96 + G) + G
    capsys.readouterr()
    assert main(["viz", "pcaa", *WORDS]) == 2
    assert "'pca'" in capsys.readouterr().err
    assert main(["viz", "similarity", *WORDS, "point=[2,0]"]) == 2
    assert "shares of the image" in capsys.readouterr().err


def test_the_command_draws_the_foreground_only_where_it_is_apart(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tiny_run)
    for apart in (True, False):  # the decision is tested above; here, that the command asks for it
        monkeypatch.setattr(viz.Basis, "separates", lambda *_, apart=apart: apart)
        assert main(["viz", "pca", *WORDS, "photos", f"out={tmp_path}/pca.png"]) == 0
        assert size_of_file(tmp_path / "pca.png")[0] == (2 + apart) * (224 + G) + G
        assert ("no picture of it" in capsys.readouterr().err) is not apart


def test_a_basis_gives_the_same_image_the_same_colours_among_others(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_run)
    basis = [f"basis={tmp_path}/basis.safetensors"]
    assert main(["viz", "pca", *WORDS, "photos", *basis, f"out={tmp_path}/all.png"]) == 0
    for name, more in {"same": basis, "other": []}.items():
        assert main(["viz", "pca", *WORDS, "photos/1.png", *more, f"out={tmp_path}/{name}.png"]) == 0
    first, same, other = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("all", "same", "other")
    )
    assert (tile(same, 0, 1, 224) == tile(first, 1, 1, 224)).all()
    assert (tile(other, 0, 1, 224) != tile(first, 1, 1, 224)).any()


def test_the_command_draws_a_video_of_a_file_and_of_a_folder(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tiny_run)
    gif(tmp_path / "clip.gif", [(40 * i, 80, 200 - 40 * i) for i in range(5)])
    clip, out = str(tmp_path / "clip.gif"), tmp_path / "out.webp"
    for kind, words, frames in (
        ("pca", [clip], 5),
        ("attention", [clip, "count=2"], 2),
        ("similarity", ["photos", "fps=5"], 3),
    ):
        assert main(["viz", kind, *WORDS, *words, f"out={out}"]) == 0
        with Image.open(out) as image:
            assert image.n_frames == frames
            image.load()
            assert image.info["duration"] == {"pca": 50, "attention": 125, "similarity": 200}[kind]
    capsys.readouterr()
    assert main(["viz", "map", *WORDS, clip]) == 2
    assert "viz map draws images, not a video" in capsys.readouterr().err
    assert main(["viz", "pca", *WORDS, clip, "photos"]) == 2
    assert "one video" in capsys.readouterr().err
    assert main(["viz", "pca", *WORDS, "absent.mp4"]) == 3
    assert "absent.mp4" in capsys.readouterr().err


def test_the_command_draws_an_mp4(tiny_run, tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    monkeypatch.chdir(tiny_run)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "yuv420p"
        for value in range(0, 250, 25):
            pixels = np.full((24, 40, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    out = tmp_path / "out.gif"
    assert main(["viz", "pca", *WORDS, str(tmp_path / "clip.mp4"), "count=5", f"out={out}"]) == 0
    with Image.open(out) as image:
        assert (image.n_frames, image.info["duration"]) == (5, 100)  # 10 frames take half a second


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_a_single_picture_has_the_format_of_its_name(tiny_run, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tiny_run)
    assert main(["viz", "crops", "weights=run", "count=1", f"out={tmp_path}/one.{kind}"]) == 0
    with Image.open(tmp_path / f"one.{kind}") as image:
        assert (image.format, getattr(image, "n_frames", 1)) == (kind.upper(), 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pca", "out=x.jpg", "weights=gone"], "out=x.jpg: it is written as NAME.png"),
        (["pca", "k=3"], "k: only with picture=neighbours, and here picture=pca"),
        (["map", "basis=x"], "basis: only with picture=pca, and here picture=map"),
        (["attention", "point=[0.1,0.1]"], "point: only with picture=similarity"),
        (["crops", "size=32"], "size: only with picture=pca or attention or"),
        (["crops", "photos"], "viz crops draws images of the run itself, not photos"),
        (["pca", "photos", "fps=3"], "fps=3: these are images, not a video"),
    ],
)
def test_the_command_refuses_what_a_picture_does_not_use(tiny_run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tiny_run)
    assert main(["viz", "weights=run", "device=cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_place_that_is_not_there_is_named_with_what_is(tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run)
    assert main(["viz", "pca", "weights=gone", "phots"]) == 3
    assert "path='phots': there is no such file or folder" in (shown := capsys.readouterr().err)
    assert "Did you mean 'photos'?" in shown
