"""NAVI's layout: the points of a pair are those of a cube of known place before two known cameras."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.pairs.navi import LISTS, rotation

SIZE = (80, 60)  # width, height of a depth map
HALF = 60.0  # millimetres: the cube is [-HALF, HALF] ** 3
FOCAL = 70.0
CAMERAS = {"000": (Rotation.from_euler("y", 20, degrees=True), [0, 0, 400.0]),
           "001": (Rotation.from_euler("yx", [-25, 15], degrees=True), [20.0, -10.0, 500.0])}  # fmt: skip


def pairs(**values):
    return registry.build(
        "data.pairs", {"name": "navi", **section_values("data.pairs", "navi", values, "test")}
    )


def ray(name, pixels):
    """The camera's place and the directions of pixels (n, 2), in coordinates of the cube."""
    turn, shift = CAMERAS[name]
    ahead = np.concatenate([(pixels - np.array(SIZE) / 2) / FOCAL, np.ones((len(pixels), 1))], axis=1)
    back = turn.inv()
    return back.apply(-np.array(shift)), back.apply(ahead)


def hit(start, directions):
    """How far along rays the cube begins, by its three pairs of planes; infinity where they miss it."""
    with np.errstate(divide="ignore"):
        ends = np.stack([(-HALF - start) / directions, (HALF - start) / directions])
    near, far = ends.min(axis=0).max(axis=1), ends.max(axis=0).min(axis=1)
    return np.where(near < far, near, np.inf)


@pytest.fixture
def root(tmp_path):
    """One object from two sides; images have twice the size of depth maps."""
    folder = tmp_path / "cube" / "wild_set"
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    rows, columns = np.indices(SIZE[::-1]) + 0.5
    about = []
    for name, (turn, shift) in CAMERAS.items():
        z = hit(*ray(name, np.stack([columns.ravel(), rows.ravel()], axis=1))).reshape(rows.shape)
        stored = np.round(10 * 65535 / z).astype(np.uint16)  # 0 at infinity
        Image.fromarray(stored).save(folder / "depth" / f"{name}.png")
        Image.new("RGB", (2 * SIZE[0], 2 * SIZE[1]), (9, 9, 9)).save(folder / "images" / f"{name}.jpg")
        x, y, w, v = turn.as_quat()
        about.append({
            "filename": f"{name}.jpg", "image_size": [2 * SIZE[1], 2 * SIZE[0]],
            "camera": {"q": [v, x, y, w], "t": shift, "focal_length": 2 * FOCAL},
        })  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(about))
    (tmp_path / LISTS).mkdir(parents=True)
    one, two = (f"cube/wild_set/images/{name}.jpg" for name in CAMERAS)
    (tmp_path / LISTS / "pairs-wild_set.txt").write_text(f"{one} {two} 47.5\n{two} {one} 130.0\n")
    return tmp_path


def test_a_point_is_the_same_place_of_the_object(root):
    (pair,) = pairs(path=str(root), points=300)
    assert np.asarray(pair.first).shape == (2 * SIZE[1], 2 * SIZE[0], 3)
    places = []
    for name, points in zip(CAMERAS, pair.points / 2, strict=True):
        start, directions = ray(name, points)
        places.append(start + directions * hit(start, directions)[:, None])
    assert 60 < len(pair.sides) < 300  # sides of the cube that the second camera does not see are left out
    np.testing.assert_allclose(
        places[0], places[1], atol=6
    )  # of 120 mm: depth is rounded, and seen at a pixel
    assert np.median(np.linalg.norm(places[0] - places[1], axis=1)) < 1.5


def test_the_object_s_side_is_that_of_its_box_in_the_second_image(root):
    (pair,) = pairs(path=str(root))
    rows, columns = np.indices(SIZE[::-1]) + 0.5
    seen = np.isfinite(hit(*ray("001", np.stack([columns.ravel(), rows.ravel()], axis=1)))).reshape(
        rows.shape
    )
    where = np.argwhere(seen)
    assert set(pair.sides) == {2 * (where.max(axis=0) - where.min(axis=0) + 1).max()}


def test_a_rotation_is_that_of_scipy():
    for turn in Rotation.random(5, random_state=0):
        x, y, z, w = turn.as_quat()
        np.testing.assert_allclose(rotation([3 * w, 3 * x, 3 * y, 3 * z]), turn.as_matrix(), atol=1e-12)


def test_pairs_are_chosen_by_their_angle(root):
    assert len(pairs(path=str(root), angle=180)) == 2
    assert pairs(path=str(root)).name(0).endswith("001.jpg")
    with pytest.raises(ValueError, match="no pair with at most angle=40"):
        pairs(path=str(root), angle=40)


def test_other_layouts_get_words(root):
    with pytest.raises(
        ValueError, match=r"not laid out as NAVI: there is no custom_splits/.*pairs-multiview\.txt"
    ):
        pairs(path=str(root), layout="multiview")
    file = root / "cube/wild_set/annotations.json"
    about = json.loads(file.read_text())
    for change, answer in (
        ({"camera": {"q": [1, 0, 0, 0]}}, r"annotations\.json: the camera of 000\.jpg is none"),
        ({"camera": {**about[0]["camera"], "q": [0, 0, 0, 0]}}, r"the camera of 000\.jpg is none.*length 0"),
        ({"filename": "x.jpg"}, r"has no camera of the image 000\.jpg"),
    ):
        file.write_text(json.dumps([{**about[0], **change}, about[1]]))
        with pytest.raises(ValueError, match=answer):
            pairs(path=str(root))[0]
    file.write_text("{}}")
    with pytest.raises(ValueError, match="no annotations as NAVI has them"):
        pairs(path=str(root))[0]
    listed = root / LISTS / "pairs-wild_set.txt"
    listed.write_text("a.jpg b.jpg\n")
    with pytest.raises(ValueError, match="line 1, is no 'IMAGE IMAGE DEGREES'"):
        pairs(path=str(root))
    listed.write_text("../../secret.jpg b.jpg 3\n")
    with pytest.raises(ValueError, match="not below the folder of images"):
        pairs(path=str(root))
