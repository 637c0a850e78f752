"""The built-in scenes: their masks and depths against plane geometry, and what makes them a source."""

import hashlib
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from dinokit.config import registry
from dinokit.data.scenes.shapes import AREA, NAMES, REACH, outline
from dinokit.data.sources.scenes import Config, Scene, Scenes, build


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    source = build(Config(split="train"))
    return [source.scene(i) for i in range(200)]


def nearest_object(scene: Scene) -> np.ndarray:
    """The pixels (S, S) of the object that nothing can hide."""
    return scene.depth == scene.depth.min()


def touches_the_border(pixels: np.ndarray) -> bool:
    return bool(pixels[[0, -1]].any() or pixels[:, [0, -1]].any())


def neighbours(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of pixels side by side, and one above the other."""
    return np.concatenate([a[:, 1:].ravel(), a[1:].ravel()]), np.concatenate(
        [a[:, :-1].ravel(), a[:-1].ravel()]
    )


def figure(area: float, xx: float, yy: float) -> float:
    """Area over the root of the determinant of the covariance; no stretch or turn changes it."""
    return area / math.sqrt((xx / area) * (yy / area))


def cross_figure(w: float) -> float:
    second = 2 * w * (2 / 3) + 2 * (1 - w) * (2 * w**3 / 3)  # a long bar, and two stumps
    return figure(8 * w - 4 * w * w, second, second)


FIGURES = {
    "disc": 4 * math.pi,
    "square": 12.0,
    "triangle": 6 * math.sqrt(3),
    "ring": 4 * math.pi * (1 - 0.56**2) / (1 + 0.56**2),
    "cross": cross_figure(0.33),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_mask_has_the_moments_of_its_figure_in_the_plane(name: str) -> None:
    label = NAMES.index(name)
    source = build(Config(size=128, split="train", count=400))
    seen = []
    for index in range(label, 400, len(NAMES)):
        pixels = nearest_object(source.scene(index))
        if not touches_the_border(pixels):
            y, x = np.nonzero(pixels)
            seen.append(len(x) / math.sqrt(np.linalg.det(np.cov(x, y))))
    assert len(seen) >= 5
    assert np.median(seen) == pytest.approx(FIGURES[name], rel=0.02)
    assert np.allclose(seen, FIGURES[name], rtol=0.06)


@pytest.mark.parametrize("label", range(len(NAMES)))
def test_all_silhouettes_have_one_area_and_stay_within_reach(label: int) -> None:
    axis = np.linspace(-2, 2, 1001, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    inside = outline(label, u, v) < 0
    assert inside.mean() * 16 == pytest.approx(AREA, rel=0.01)
    assert np.hypot(u, v)[inside].max() < REACH


def test_objects_stand_before_a_plane(scenes: list[Scene]) -> None:
    for scene in scenes[:50]:
        ground = scene.mask == 0
        y, x = np.nonzero(ground)
        plane = np.stack([x, y, np.ones_like(x)], axis=1).astype(float)
        inverse = 1 / scene.depth[ground].astype(float)
        fit, *_ = np.linalg.lstsq(plane, inverse, rcond=None)
        assert np.abs(plane @ fit - inverse).max() < 1e-6
        assert fit[1] > 0  # nearer at the bottom
        yy, xx = np.nonzero(~ground)
        behind = 1 / (np.stack([xx, yy, np.ones_like(xx)], axis=1) @ fit)
        assert (scene.depth[~ground] < behind - 1).all()


def test_every_edge_of_a_mask_is_a_step_in_depth_and_the_object_is_the_near_side(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        (mask_a, mask_b), (a, b) = neighbours(scene.mask), neighbours(scene.depth)
        edge = mask_a != mask_b
        assert edge.any()
        assert (np.where(mask_a > 0, b - a, a - b)[edge] > 1.0).all()
        on_ground = (mask_a == 0) & (mask_b == 0)
        assert np.abs(a - b)[on_ground].max() < 1.0


def test_objects_that_overlap_differ_in_depth(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        levels = np.unique(scene.depth[scene.mask > 0])
        assert 1 <= len(levels) <= 16
        assert (np.diff(levels) > 0.025).all()  # 16 strata between 2.4 and 4.4 m leave gaps of 2.7 cm or more


def test_far_objects_are_smaller_and_hazier() -> None:
    source = build(Config(size=64, split="train", count=600))
    distance, area, contrast = [], [], []
    for index in range(0, 600, 3):
        scene = source.scene(index)
        for level in np.unique(scene.depth[scene.mask > 0]):
            pixels = scene.depth == level
            if not touches_the_border(pixels):
                distance.append(level)
                area.append(math.sqrt(pixels.sum()))
                contrast.append(np.ptp(scene.image[pixels].mean(axis=0)))  # how far its colour is from a grey
    assert np.corrcoef(distance, area)[0, 1] < -0.6
    assert np.corrcoef(distance, contrast)[0, 1] < -0.05


def test_the_image_changes_where_the_mask_does(scenes: list[Scene]) -> None:
    def mean_step(shift: int) -> float:
        steps = []
        for scene in scenes:
            grey = scene.image.astype(float).mean(axis=2)
            step = np.abs(grey[:, 2:] - grey[:, :-2])
            edge = np.roll(scene.mask > 0, shift, axis=1)
            steps.append(step[edge[:, 1:-1] != edge[:, :-2]].mean())
        return float(np.mean(steps))

    assert mean_step(0) > 1.5 * mean_step(6)


def test_the_mask_is_that_of_the_class(scenes: list[Scene]) -> None:
    for scene in scenes[:30]:
        assert set(np.unique(scene.mask)) == {0, scene.label + 1}
        assert 0.03 < (scene.mask > 0).mean() < 0.7


def test_a_scene_is_a_function_of_seed_split_and_number() -> None:
    source = build(Config(split="train"))
    late = source.scene(7)
    early = build(Config(split="train")).scene(7)
    assert (late.image == early.image).all()
    assert (late.mask == early.mask).all()
    assert (late.depth == early.depth).all()
    longer = build(Config(split="train", count=99, test_count=5))
    assert (longer.scene(7).image == late.image).all()


def test_another_process_draws_the_same_scenes() -> None:
    code = (
        "import hashlib; from dinokit.data.sources.scenes import Config, build;"
        "s = build(Config(seed=3, size=48));"
        "print(hashlib.sha256(b''.join(s.scene(i).image.tobytes() for i in range(5))).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    source = build(Config(seed=3, size=48))
    assert there == hashlib.sha256(b"".join(source.scene(i).image.tobytes() for i in range(5))).hexdigest()


def test_a_pickled_copy_draws_the_same_scenes() -> None:
    source = build(Config(split="test"))
    data = pickle.dumps(source)
    assert len(data) < 200_000  # loader processes receive it
    assert (pickle.loads(data).scene(11).image == source.scene(11).image).all()


def test_splits_and_seeds_share_no_scene() -> None:
    cases = [Config(seed=seed, split=split) for seed in (0, 1) for split in ("train", "test")]
    images = {build(cfg).scene(index).image.tobytes() for cfg in cases for index in range(20)}
    assert len(images) == 4 * 20


def test_all_is_the_training_scenes_and_then_the_test_scenes() -> None:
    whole = build(Config(count=13, test_count=5))
    splits = [build(Config(count=13, test_count=5, split=split)) for split in ("train", "test")]
    assert (len(whole), len(splits[0]), len(splits[1])) == (18, 13, 5)
    pairs = [(half, index) for half in splits for index in range(len(half))]
    for index, (half, number) in enumerate(pairs):
        assert whole.name(index) == half.name(number)
        assert (whole.scene(index).image == half.scene(number).image).all()
    assert (whole.name(12), whole.name(13)) == ("scenes train 12", "scenes test 0")


@pytest.mark.parametrize("size", [32, 50, 96])
def test_an_item_is_a_square_picture_and_its_class(size: int) -> None:
    source = build(Config(size=size, count=30, split="train"))
    image, label = source[23]
    assert (image.size, image.mode) == ((size, size), "RGB")
    assert source.classes[label] == NAMES[label]
    scene = source.scene(23)
    assert (np.asarray(image) == scene.image).all()
    assert label == scene.label
    assert (scene.mask.dtype, scene.depth.dtype) == (np.uint8, np.float32)
    assert scene.mask.shape == scene.depth.shape == (size, size)


def test_a_recipe_can_name_it() -> None:
    assert isinstance(registry.build("data.sources", {"name": "scenes", "size": 32, "count": 2}), Scenes)
    assert registry.read_config("data.sources", "scenes")().count == Config().count


@pytest.mark.parametrize("index", [-1, 4])
def test_a_scene_out_of_range_is_an_index_error(index: int) -> None:
    source = build(Config(count=4, split="train"))
    with pytest.raises(IndexError, match="split 'train' has 4"):
        source[index]


@pytest.mark.parametrize(
    ("key", "value"), [("size", 31), ("count", 0), ("test_count", 0), ("seed", -1), ("split", "val")]
)
def test_a_setting_that_makes_no_sense_is_named(key: str, value: int | str) -> None:
    with pytest.raises(ValueError, match=rf"{value}"):
        build(Config(**{key: value}))
