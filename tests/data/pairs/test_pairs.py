"""Pairs of images: points of the built-in scenes lie on the same material, and SPair-71k's layout is read."""

import json

import numpy as np
import pytest
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.scenes import World


def pairs(name="scenes", **values):
    return registry.build("data.pairs", {"name": name, **section_values("data.pairs", name, values, "test")})


def test_a_point_stays_on_its_object():
    source, world = pairs(pairs=5), World(64, 0, "test")
    for index in range(len(source)):
        pair, frames = source[index], world.clip(index, 2)
        assert np.array_equal(np.asarray(pair.first), frames[0].image)
        columns, rows = np.floor(pair.points).astype(int).transpose(2, 0, 1)
        before, after = frames[0].instances[rows[0], columns[0]], frames[1].instances[rows[1], columns[1]]
        assert (before == after).all()
        assert before.all()
        for number, side in zip(after, pair.sides, strict=True):
            where = np.argwhere(frames[1].instances == number)
            assert side == (where.max(axis=0) - where.min(axis=0) + 1).max()


class Dotted(World):
    """Objects of one colour, with a dot of the other colour at a place of the material."""

    place, radius = (0.4, -0.3), 0.12

    def _material(self, thing, u, v, r, radius):
        return (np.hypot(u - self.place[0], v - self.place[1]) < self.radius).astype(np.float32)


class Plain(Dotted):
    radius = 0.0


def test_a_point_is_where_the_renderer_draws_it():
    checked = 0
    for index in range(3):
        dotted, plain = (kind(160, 0, "test").clip(index, 3) for kind in (Dotted, Plain))
        tracks = World(160, 0, "test").tracks(index, 3, np.array([Dotted.place]))
        for frame, same, places in zip(dotted, plain, tracks, strict=True):
            change = np.abs(frame.image.astype(float) - same.image).sum(axis=2)
            for number, ((x, y),) in enumerate(places, start=1):
                rows, columns = np.indices(change.shape) + 0.5
                window = np.maximum(abs(columns - x), abs(rows - y)) < 9  # contains the dot
                if (frame.instances[window] == number).all():
                    dot = window & (change > 20)
                    assert (columns[dot].mean(), rows[dot].mean()) == pytest.approx((x, y), abs=0.4)
                    checked += 1
    assert checked > 10


def test_objects_move_between_the_images():
    source = pairs(pairs=8)
    moved = np.concatenate([np.diff(source[i].points, axis=0)[0] for i in range(8)])
    assert np.median(np.linalg.norm(moved, axis=1)) > 4  # pixels of 64


def test_a_size_shows_the_same_points():
    small, large = pairs(pairs=1)[0], pairs(pairs=1, size=256)[0]
    inner = [np.unique(np.round(pair.points[0] / pair.first.size[0], 6), axis=0) for pair in (small, large)]
    shared = {tuple(row) for row in inner[0]} & {tuple(row) for row in inner[1]}
    assert len(shared) > 0.8 * max(len(rows) for rows in inner)


def test_pairs_of_scenes_are_numbered():
    assert pairs().name(3) == "scenes test 3"
    with pytest.raises(IndexError, match="no pair 2: there are 2"):
        pairs(pairs=2)[2]


@pytest.fixture
def spair(tmp_path):
    """Two images of a category, and one pair of them."""
    for folder in ("JPEGImages/cat", "PairAnnotation/test", "Layout/large"):
        (tmp_path / folder).mkdir(parents=True)
    for name, size in (("a", (40, 30)), ("b", (50, 60))):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / f"JPEGImages/cat/{name}.jpg")
    about = {
        "src_imname": "a.jpg", "trg_imname": "b.jpg", "category": "cat", "trg_bndbox": [10, 5, 40, 55],
        "src_kps": [[1, 2], [3, 4], [5, 6]], "trg_kps": [[10, 20], [30, 40], [11, 12]],
    }  # fmt: skip
    (tmp_path / "PairAnnotation/test/000001-a-b:cat.json").write_text(json.dumps(about))
    (tmp_path / "Layout/large/test.txt").write_text("000001-a-b:cat\n")
    return tmp_path, about


def test_spair_is_read_as_delivered(spair):
    source = pairs("spair", path=str(spair[0]))
    (pair,) = (source[index] for index in range(len(source)))
    assert (np.asarray(pair.first).shape, np.asarray(pair.second).shape) == ((30, 40, 3), (60, 50, 3))
    assert pair.points.tolist() == [spair[1]["src_kps"], spair[1]["trg_kps"]]
    assert pair.sides.tolist() == [50, 50, 50]
    assert source.name(0).endswith("000001-a-b:cat.json")


def test_other_layouts_get_words(spair):
    root, about = spair
    with pytest.raises(ValueError, match=r"not laid out as SPair-71k: there is no Layout/small/test\.txt"):
        pairs("spair", path=str(root), layout="small")
    file = root / "PairAnnotation/test/000001-a-b:cat.json"
    for change in ({"trg_kps": [[1, 2]]}, {"trg_bndbox": [1, 2, 3]}, {"trg_bndbox": [4, 4, 4, 4]}):
        file.write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match="000001-a-b:cat"):
            pairs("spair", path=str(root))[0]
    file.write_text(json.dumps({**about, "src_imname": "../../secret.jpg"}))
    with pytest.raises(ValueError, match=r"secret\.jpg', which is not below the folder of images"):
        pairs("spair", path=str(root))[0]
    (root / "Layout/large/test.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no pair"):
        pairs("spair", path=str(root))
