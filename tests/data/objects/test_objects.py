"""Masks as run lengths, and the layouts of images with masks of objects, written as they are on disk."""

import io
import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data import scenes
from dinokit.data.objects import ndimage, objects_of_ids
from dinokit.data.objects.coco import inside, read_segmentation
from dinokit.data.objects.rle import Rle, decode, encode, from_json, to_json


def build(name, **values):
    return registry.build("data.objects", {"name": name, **section_values("data.objects", name, values, "x")})


masks = st.tuples(st.integers(1, 9), st.integers(1, 70)).flatmap(lambda shape: arrays(bool, shape))


def test_runs_go_down_the_columns_and_begin_with_zeros():
    assert encode(np.array([[0, 1, 1], [1, 1, 0]], bool)).counts.tolist() == [1, 4, 1]
    assert encode(np.ones((2, 2), bool)).counts.tolist() == [0, 4]
    assert encode(np.zeros((2, 2), bool)).counts.tolist() == [4]


@pytest.mark.parametrize(
    ("runs", "text"), [([1, 4, 1], "141"), ([6, 1, 40, 4, 5, 4, 5, 4, 21], "61X13mN000`0")]
)
def test_a_string_of_known_runs(runs, text):
    size = (sum(runs), 1)
    assert to_json(Rle(size, np.array(runs)))["counts"] == text
    assert from_json({"size": size, "counts": text}, "x").counts.tolist() == runs


@given(masks)
def test_a_mask_survives_every_form(mask):
    rle = encode(mask)
    assert (decode(rle) == mask).all()
    assert rle.area == mask.sum()
    for form in (to_json(rle), {"size": mask.shape, "counts": rle.counts.tolist()}):
        assert (decode(from_json(json.loads(json.dumps(form)), "x")) == mask).all()


@given(masks)
def test_strings_are_those_of_pycocotools(mask):
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert to_json(encode(mask))["counts"] == theirs["counts"].decode()
    assert (decode(from_json({**theirs, "counts": theirs["counts"].decode()}, "x")) == mask).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"size": [2, 2], "counts": [1, 2]}, "add up to 3"),
        ({"size": [2, 2]}, "no run lengths"),
        ([], "no run"),
    ],
)
def test_what_is_no_mask_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        from_json(value, "a.json")


def test_a_polygon_covers_the_pixels_whose_centre_is_inside():
    square = read_segmentation([[1, 1, 4, 1, 4, 3, 1, 3]], (5, 6), "x")
    assert np.argwhere(decode(square)).tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]
    turns = np.linspace(0, 2 * np.pi, 400)
    corners = np.stack([50 + 30 * np.cos(turns), 40.3 + 30 * np.sin(turns)], axis=1)
    y, x = np.mgrid[:90, :100] + 0.5
    near = np.abs(np.hypot(x - 50, y - 40.3) - 30) < 0.01  # where a polygon of 400 corners is not a circle
    assert (inside(corners, (90, 100)) == (np.hypot(x - 50, y - 40.3) < 30))[~near].all()
    both = decode(read_segmentation([[0, 0, 2, 0, 2, 2, 0, 2], [6, 6, 12, 6, 12, 9, 6, 9]], (10, 10), "x"))
    assert both.sum() == 4 + 12  # the second reaches beyond the image
    with pytest.raises(ValueError, match="neither run lengths nor a list of polygons"):
        read_segmentation([[1, 2, 3]], (4, 4), "x")


def test_scenes_of_several_kinds_know_their_objects():
    source = build("scenes", count=8, test_count=2, split="train")
    several = []
    for index in range(len(source)):
        image, objects = source[index]
        scene = source.scene(index)
        assert image.size == (64, 64)
        assert sum(rle.area for rle in objects.rles) == (scene.instances > 0).sum()
        for number, label in enumerate(objects.labels):
            assert set(scene.mask[objects.mask(number)]) == {label + 1}
        several.append(len(set(objects.labels)))
    assert max(several) == 3
    assert min(several) >= 2
    assert (source.scene(0).image != build("scenes", split="test").scene(0).image).any()
    assert len(pickle.loads(pickle.dumps(source))[3][1]) == len(source[3][1])


def test_held_out_kinds_never_appear():
    kinds = ("bars", "dots", "net")
    source = build("scenes", kinds=kinds, count=12)
    labels = {label for index in range(12) for label in source[index][1].labels}
    assert labels == {scenes.NAMES.index(name) for name in kinds}
    with pytest.raises(ValueError, match="two kinds or more"):
        build("scenes", kinds=("bars",))
    with pytest.raises(ValueError, match="there is no kind 'stripes'"):
        build("scenes", kinds=("stripes", "bars"))


def test_other_scenes_are_drawn_as_before():
    """A stream's place is part of the seed of its scenes."""
    assert scenes._STREAMS[:4] == ("train", "test", "clip train", "clip test")


def test_scenes_of_one_kind_are_those_of_the_images():
    plain = registry.build("data.sources", {"name": "scenes"})
    source = build("scenes", mixed=False)
    assert (np.asarray(source[3][0]) == np.asarray(plain[3][0])).all()
    assert set(source[3][1].labels) == {3}


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


IDS = np.array([[0, 0, 1, 1, 0], [3, 0, 1, 0, 0], [3, 3, 0, 0, 3]], np.uint8)


def test_parquet_has_a_map_of_objects(tmp_path):
    rows = {
        "image": [png(np.zeros((3, 5, 3), np.uint8))],
        "instances": [png(IDS)],
        "mask": [png(np.where(IDS == 3, 1, 0).astype(np.uint8))],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = build("parquet", path=str(tmp_path / "a.parquet"))
    objects = source[0][1]
    assert (objects.mask(0) == (IDS == 1)).all()
    assert (objects.mask(1) == (IDS == 3)).all()
    assert (list(objects.labels), list(source.classes)) == ([0, 0], ["object"])
    named = build("parquet", path=str(tmp_path / "a.parquet"), mask="mask", classes=["p", "q"])
    assert list(named[0][1].labels) == [0, 1]
    with pytest.raises(ValueError, match=r"no column 'instance' for instances.* mean 'instances'"):
        build("parquet", path=str(tmp_path / "a.parquet"), instances="instance")


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (np.where(IDS == 3, 255, 0), [0, -1]),
        (np.where(IDS == 3, 7, 0), "has the id 7, and there are 2 classes"),
        (np.zeros((5, 3)), "The map of classes of .* has 3 x 5 pixels, that of its objects 5 x 3"),
    ],
)
def test_classes_of_parquet_that_do_not_fit_are_named(tmp_path, classes, labels):
    rows = {
        "image": [png(np.zeros((3, 5, 3), np.uint8))],
        "instances": [png(IDS)],
        "mask": [png(classes.astype(np.uint8))],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = build("parquet", path=str(tmp_path / "a.parquet"), mask="mask", classes=["p", "q"])
    if isinstance(labels, list):
        assert list(source[0][1].labels) == labels
    else:
        with pytest.raises(ValueError, match=labels):
            source[0]


def test_parts_of_classes_are_objects(tmp_path):
    for folder, array in (("images", np.zeros((3, 5, 3), np.uint8)), ("masks", np.where(IDS == 3, 1, 0))):
        (tmp_path / folder).mkdir()
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / folder / "a.png")
    section = {"name": "folders", "path": str(tmp_path), "classes": ["ground", "thing"]}
    source = build("maps", maps=section, min_area=1)
    objects = source[0][1]
    assert sorted(rle.area for rle in objects.rles) == [1, 3]
    assert list(objects.labels) == [1, 1]
    assert len(build("maps", maps=section, min_area=2)[0][1]) == 1
    with pytest.raises(ValueError, match="leaves no class"):
        build("maps", maps=section, leave_out=["ground", "thing"])
    with pytest.raises(ValueError, match=r"maps.name must be given"):
        build("maps")


@pytest.fixture
def coco(tmp_path):
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 3)).save(tmp_path / "b.png")
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 3, "width": 5},
            {"id": 8, "file_name": "b.png", "height": 3, "width": 5},
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "bus"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "segmentation": to_json(encode(IDS == 3))},
            {"image_id": 7, "category_id": 3, "segmentation": [[0, 0, 5, 0, 5, 2, 0, 2]]},
            {"image_id": 7, "category_id": 3, "iscrowd": 1, "segmentation": to_json(encode(IDS == 1))},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_has_polygons_and_runs_and_leaves_crowds_out(coco):
    source = build("coco", path=str(coco), annotations="instances.json")
    assert (len(source), list(source.classes)) == (1, ["bus", "cat"])
    objects = source[0][1]
    assert list(objects.labels) == [1, 0]
    assert (objects.mask(0) == (IDS == 3)).all()
    assert objects.mask(1)[1].all()
    (coco / "x.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"x.json is no file of instances"):
        build("coco", path=str(coco), annotations="x.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("category_id", 5, "has masks of category_id=5, which its `categories` do not list"),
        ("segmentation", to_json(encode(IDS.T == 3)), "the masks have 3 x 5 pixels, the image 5 x 3"),
    ],
)
def test_instances_of_coco_that_do_not_fit_are_named(coco, key, value, message):
    content = json.loads((coco / "instances.json").read_text())
    content["annotations"][0][key] = value
    (coco / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build("coco", path=str(coco), annotations="instances.json")[0]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_coco_reads_nothing_outside_of_its_folder(coco, name):
    content = json.loads((coco / "instances.json").read_text())
    content["images"][0]["file_name"] = name
    (coco / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json names the image '.*secret\.png'"):
        build("coco", path=str(coco), annotations="instances.json")


def test_sa1b_has_a_file_beside_each_image(tmp_path):
    Image.new("RGB", (5, 3)).save(tmp_path / "a.jpg")
    Image.new("RGB", (5, 3)).save(tmp_path / "without.jpg")
    content = {
        "image": {"height": 3, "width": 5},
        "annotations": [{"segmentation": to_json(encode(IDS == 1))}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    source = build("sa1b", path=str(tmp_path))
    assert len(source) == 1
    assert (source[0][1].mask(0) == (IDS == 1)).all()
    content["image"]["height"] = 4
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the masks have 5 x 4 pixels, the image 5 x 3"):
        source[0]
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a.json is no file of masks"):
        source[0]
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="no image with a file of masks beside it"):
        build("sa1b", path=str(tmp_path))


def test_without_scipy_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[segment\]' in the clone"):
        ndimage()


def test_objects_to_learn_from_are_neither_tiny_nor_everything():
    ids = np.ones((10, 10), np.uint8)
    ids[0, 0] = 2
    assert objects_of_ids(ids).chosen(4) == []
    ids[:5] = 3
    assert objects_of_ids(ids).chosen(4) == [0, 1]
