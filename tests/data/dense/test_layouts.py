"""Layouts of images with maps, written as the data sets are on disk, and the errors for wrong ones."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.loader import dense_loader
from dinokit.data.sources import scenes


def build(name, **values):
    return registry.build("data.dense", {"name": name, **section_values("data.dense", name, values, "x")})


def image(path, shade=7, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade,) * 3).save(path)


def ids(path, rows, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(rows)
    picture = Image.fromarray(array.astype(np.uint16 if array.max() > 255 else np.uint8))
    if palette:
        picture.putpalette([255 - i // 3 for i in range(768)])
    picture.save(path)


ROWS = [[0, 1, 2, 255, 0, 1]] * 4


def maps_of(source):
    return [source[i][1] for i in range(len(source))]


def test_folders_pair_by_name_and_split_by_subfolder(tmp_path):
    for split, stem in (("train", "a"), ("train", "b"), ("val", "c")):
        image(tmp_path / "images" / split / f"{stem}.png")
        ids(tmp_path / "masks" / split / f"{stem}.png", ROWS, palette=stem == "b")
    got = build("folders", path=str(tmp_path), classes=["x", "y", "z"], split="train")
    assert [got.name(i)[-5:] for i in range(2)] == ["a.png", "b.png"]
    for ids_ in maps_of(got):
        assert ids_.dtype == np.int16
        assert ids_[0].tolist() == [0, 1, 2, -1, 0, 1]
    assert len(build("folders", path=str(tmp_path), classes=["x", "y", "z"], split="test")) == 1
    assert len(pickle.loads(pickle.dumps(got))[0]) == 2


def test_zero_can_be_left_out_and_the_others_moved_down(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    ids(tmp_path / "masks" / "a.png", ROWS)
    got = build("folders", path=str(tmp_path), classes=["x", "y"], reduce_zero_label=True)
    assert got[0][1][0].tolist() == [-1, 0, 1, -1, -1, 0]


def test_sixteen_bits_are_metres_and_zero_is_no_reading(tmp_path):
    image(tmp_path / "images" / "a.jpg", size=(3, 1))
    ids(tmp_path / "depth" / "a.png", [[0, 1500, 65535]])
    got = build("folders", path=str(tmp_path), target="depth")
    assert got[0][1].dtype == np.float32
    assert got[0][1].tolist() == [[0, pytest.approx(1.5), pytest.approx(65.535)]]
    assert got.classes == ()


def test_ade20k_voc_and_cityscapes_are_read_as_they_lie_on_disk(tmp_path):
    for split in ("training", "validation"):
        image(tmp_path / "ade/images" / split / f"{split}.jpg")
        ids(tmp_path / "ade/annotations" / split / f"{split}.png", [[0, 1, 150, 2, 3, 4]] * 4)
    got = build("ade20k", path=str(tmp_path / "ade"), split="test")
    assert len(got) == 1
    assert got[0][1][0].tolist() == [-1, 0, 149, 1, 2, 3]
    assert len(got.classes) == 150
    voc = tmp_path / "voc"
    image(voc / "JPEGImages/one.jpg")
    image(voc / "JPEGImages/unused.jpg")
    ids(voc / "SegmentationClass/one.png", [[0, 15, 20, 255, 1, 2]] * 4, palette=True)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/train.txt").write_text("one\n")
    got = build("voc2012", path=str(voc), split="train")
    assert (len(got), got[0][1][0].tolist()) == (1, [0, 15, 20, -1, 1, 2])
    assert got.classes[15] == "person"
    city = tmp_path / "city"
    image(city / "leftImg8bit/val/bonn/x_leftImg8bit.png")
    image(city / "leftImg8bit/test/bonn/y_leftImg8bit.png")
    ids(city / "gtFine/val/bonn/x_gtFine_labelIds.png", [[7, 33, 0, 26, 4, 8]] * 4)
    ids(city / "gtFine/val/bonn/x_gtFine_instanceIds.png", ROWS)
    got = build("cityscapes", path=str(city), split="test")
    assert (len(got), got[0][1][0].tolist()) == (1, [0, 18, -1, 13, -1, 1])


@pytest.mark.parametrize(("name", "scale"), [("nyu", 1000), ("kitti", 256), ("sunrgbd", 8000)])
def test_depth_sets_come_as_lists_of_pairs(tmp_path, name, scale):
    config = registry.read_config("data.dense", name)()
    image(tmp_path / config.images / "rgb/1.jpg", size=(2, 1))
    ids(tmp_path / config.maps / "d/1.png", [[0, 2 * scale]])
    (tmp_path / config.test).write_text("/rgb/1.jpg /d/1.png 518.8\nrgb/2.jpg None 518.8\n")
    got = build(name, path=str(tmp_path), split="test")
    assert (len(got), got[0][1].tolist()) == (1, [[0.0, 2.0]])
    (tmp_path / config.test).write_text("rgb/9.jpg d/1.png\n")
    with pytest.raises(ValueError, match=r"9.jpg, which does not exist"):
        build(name, path=str(tmp_path), split="test")
    with pytest.raises(ValueError, match="no such file"):
        build(name, path=str(tmp_path), split="train")


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def parquet(tmp_path):
    about = {"classes": ["a", "b", "c"], "coarse_classes": ["p", "q"], "fine_to_coarse": [0, 1, 1]}
    rows = {
        "image": [png(np.full((4, 6, 3), n, np.uint8)) for n in range(3)],
        "mask": [png(np.array(ROWS, np.uint8))] * 3,
        "depth": [png(np.full((4, 6), 1000 * n, np.uint16)) for n in range(3)],
        "split": ["train", "val", "train"],
    }
    table = pa.table(rows).replace_schema_metadata({"dinokit": json.dumps(about)})
    pq.write_table(table, tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_parquet_gives_masks_coarse_masks_and_depths(parquet):
    fine = build("parquet", path=str(parquet), split="train")
    assert (len(fine), list(fine.classes), fine[0][1][0].tolist()) == (
        2,
        ["a", "b", "c"],
        [0, 1, 2, -1, 0, 1],
    )
    coarse = build("parquet", path=str(parquet), coarse=True)
    assert (list(coarse.classes), coarse[0][1][0].tolist()) == (["p", "q"], [0, 1, 1, -1, 0, 1])
    depth = build("parquet", path=str(parquet), target="depth", split="test")
    assert (len(depth), depth[0][1].max()) == (1, 1.0)
    assert np.asarray(depth[0][0]).max() == 1
    with pytest.raises(ValueError, match=r"no column 'masc' for mask. Did you mean 'mask'"):
        build("parquet", path=str(parquet), mask="masc")


def test_names_of_labels_are_not_taken_for_those_of_masks(parquet):
    table = pq.read_table(parquet)
    pq.write_table(table.append_column("label", pa.array([0, 1, 2])), parquet)
    with pytest.raises(ValueError, match=r"does not name the classes of its masks: .* classes="):
        build("parquet", path=str(parquet))


def test_the_scenes_have_both_maps():
    mask = build("scenes", count=3, test_count=2, size=32, split="test")
    depth = build("scenes", count=3, test_count=2, size=32, split="test", target="depth")
    truth = scenes.build(scenes.Config(size=32, count=3, test_count=2, split="test")).scene(1)
    assert np.array_equal(mask[1][1], truth.mask)
    assert np.array_equal(depth[1][1], truth.depth)
    assert mask.classes[0] == "ground"
    assert len(mask.classes) == 11


def test_a_map_of_another_size_is_named(tmp_path):
    image(tmp_path / "images/a.jpg", size=(5, 4))
    ids(tmp_path / "masks/a.png", ROWS)
    source = build("folders", path=str(tmp_path), classes=["x", "y", "z"])
    with pytest.raises(ValueError, match=r"a.png: the map has 6 x 4 pixels, its image 5 x 4"):
        source[0]
    with pytest.raises(ValueError, match=r"^[^\n]*a.png: the map has 6 x 4 pixels[^\n]*$"):
        list(dense_loader(source, [0], workers=1))  # without the worker's traceback


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: ids(p, [[0, 9, 2, 8, 0, 1]] * 4), "has the ids 8, 9, and there are 3 classes"),
        (lambda p: Image.new("RGB", (6, 4)).save(p), "a map has one number per pixel"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n"), "cannot be read"),
    ],
)
def test_a_map_that_cannot_be_right_is_named(tmp_path, write, message):
    image(tmp_path / "images/a.jpg")
    (tmp_path / "masks").mkdir()
    write(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match=rf"a.png.*{message}"):
        build("folders", path=str(tmp_path), classes=["x", "y", "z"])[0]


def test_what_is_missing_is_named(tmp_path):
    image(tmp_path / "images/a.jpg")
    image(tmp_path / "images/b.jpg")
    ids(tmp_path / "masks/a.png", ROWS)
    with pytest.raises(ValueError, match=r"1 of 2 files have no map of the same name in .*: b.jpg"):
        build("folders", path=str(tmp_path), classes=["x", "y"])
    ids(tmp_path / "masks/b.png", ROWS)
    ids(tmp_path / "masks/c.png", ROWS)
    with pytest.raises(ValueError, match=r"1 of 3 files have no image .*: c.png"):
        build("folders", path=str(tmp_path), classes=["x", "y"])
    (tmp_path / "masks/c.png").unlink()
    with pytest.raises(ValueError, match=r"`classes` has 0 name"):
        build("folders", path=str(tmp_path))
    with pytest.raises(ValueError, match="has no 'nowhere'"):
        build("folders", path=str(tmp_path / "nowhere"), classes=["x", "y"])
