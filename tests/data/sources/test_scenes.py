"""The built-in scenes: image, class, objects and depth agree, and what makes them a source."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dinokit.config import registry
from dinokit.data.scenes import CAMERA, FAR, NAMES, NEAR, OBJECTS, WALL, Scene, World
from dinokit.data.sources.scenes import Config, Scenes, build


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    source = build(Config(split="train"))
    return [source.scene(i) for i in range(200)]


def neighbours(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of pixels side by side, and one above the other."""
    return np.concatenate([a[:, 1:].ravel(), a[1:].ravel()]), np.concatenate(
        [a[:, :-1].ravel(), a[:-1].ravel()]
    )


def test_the_ground_is_a_floor_before_a_wall(scenes: list[Scene]) -> None:
    y = (np.arange(64) + 0.5) / 32 - 1
    for scene in scenes[:50]:
        ground = scene.mask == 0
        floor = ground & (scene.depth < WALL)
        assert (scene.depth[ground & ~floor] == np.float32(WALL)).all()
        rows, _ = np.nonzero(floor)
        horizon = y[rows] - CAMERA / scene.depth[floor]  # the same from every pixel of the floor
        assert np.ptp(horizon) < 1e-5
        assert -0.8 <= horizon.mean() <= -0.3


def test_every_object_has_one_distance_and_nearer_ones_have_smaller_numbers(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert ((scene.instances > 0) == (scene.mask > 0)).all()
        numbers = np.unique(scene.instances[scene.instances > 0])
        assert 1 <= len(numbers) <= numbers.max() <= OBJECTS[1]
        levels = [np.unique(scene.depth[scene.instances == number]) for number in numbers]
        assert all(len(level) == 1 for level in levels)
        assert (np.diff(np.concatenate(levels)) > 0.02).all()
        assert NEAR <= levels[0][0] <= levels[-1][0] <= FAR


def test_an_object_stands_on_the_floor_and_hides_what_is_behind_it(scenes: list[Scene]) -> None:
    y = (np.arange(64) + 0.5) / 32 - 1
    for scene in scenes[:100]:
        floor = (scene.mask == 0) & (scene.depth < WALL)
        if not floor.any():
            continue
        rows, _ = np.nonzero(floor)
        horizon = float(np.median(y[rows] - CAMERA / scene.depth[floor]))
        behind = np.minimum(CAMERA / np.maximum(y - horizon, 0.01), WALL)[:, None] * np.ones(64)
        objects = scene.mask > 0
        hidden = (scene.depth < behind)[objects]
        assert (
            hidden.mean() > 0.85
        )  # all but the part below its foot, which is before the floor point under it
        edge = np.array(neighbours(scene.instances))
        depths = np.array(neighbours(scene.depth))
        both = (edge > 0).all(axis=0) & (edge[0] != edge[1])
        assert ((edge[0] < edge[1]) == (depths[0] < depths[1]))[both].all()


def test_far_objects_are_smaller_and_hazier(scenes: list[Scene]) -> None:
    distance, area, contrast = [], [], []
    for scene in scenes:
        for number in np.unique(scene.instances[scene.instances > 0]):
            pixels = scene.instances == number
            if not (pixels[[0, -1]].any() or pixels[:, [0, -1]].any()):
                distance.append(float(scene.depth[pixels][0]))
                area.append(float(pixels.sum()) ** 0.5)
                contrast.append(float(scene.image[pixels].std(axis=0).mean()))
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

    assert mean_step(0) > 1.2 * mean_step(6)


def test_the_mask_is_that_of_the_class(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert set(np.unique(scene.mask)) == {0, scene.label + 1}
        assert 0.03 < (scene.mask > 0).mean() < 0.7


def test_another_size_shows_the_same_scene() -> None:
    small, large = World(64), World(128)
    for index in range(20):
        a, b = small.scene(index), large.scene(index)
        assert a.label == b.label
        assert (a.instances != b.instances[::2, ::2]).mean() < 0.05
        averaged = b.image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(a.image - averaged).mean() < 10
        assert np.corrcoef(a.depth.ravel(), b.depth[::2, ::2].ravel())[0, 1] > 0.98


def test_images_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(Config(seed=77, split="train"))
    first = np.asarray(source[5][0]).copy()
    monkeypatch.setattr(World, "scene", lambda *_: pytest.fail("rendered again"))
    again = build(Config(seed=77, count=50, split="all"))  # another source of the same scenes
    assert (np.asarray(again[5][0]) == first).all()


def test_what_a_loader_process_renders_is_known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(Config(seed=78, count=20, split="train"))
    loader = DataLoader(Arrays(source), batch_size=5, num_workers=1, multiprocessing_context="fork")
    images = torch.cat(list(loader)).numpy()
    monkeypatch.setattr(World, "scene", lambda *_: pytest.fail("rendered again"))
    assert all((np.asarray(source[i][0]) == images[i]).all() for i in range(20))


class Arrays(Dataset):
    def __init__(self, source: Scenes) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.source[index][0]))


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
