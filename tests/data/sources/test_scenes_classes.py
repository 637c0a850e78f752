"""The built-in scenes: what tells their classes apart, and what must not."""

import numpy as np
import pytest
from PIL import Image

from dinokit.data.scenes.shapes import NAMES
from dinokit.data.sources.scenes import Config, Scene, build

TRAIN, TEST = 1000, 300
CHANCE = 1 / len(NAMES)


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    source = build(Config(split="train", count=TRAIN, test_count=TEST))
    return [source.scene(i) for i in range(TRAIN)]


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    source = build(Config(split="test", count=TRAIN, test_count=TEST))
    return [source.scene(i) for i in range(TEST)]


def labels_of(scenes: list[Scene]) -> np.ndarray:
    return np.array([scene.label for scene in scenes])


def nearest_object(scene: Scene) -> np.ndarray:
    """The pixels (S, S) of the object that nothing can hide."""
    return scene.depth == scene.depth.min()


def vote(train: np.ndarray, query: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    train, query = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (train, query))
    nearest = np.argsort(-query @ train.T, axis=1)[:, :k]
    return np.array([np.bincount(labels[row]).argmax() for row in nearest])


@pytest.mark.parametrize("side", [16, 64])
def test_pixels_alone_do_not_tell_the_class(train: list[Scene], held_out: list[Scene], side: int) -> None:
    def flat(scenes: list[Scene]) -> np.ndarray:
        small = [
            np.asarray(Image.fromarray(s.image).resize((side, side), Image.Resampling.BOX)) for s in scenes
        ]
        return np.stack(small).reshape(len(scenes), -1).astype(np.float32)

    found = vote(flat(train), flat(held_out), labels_of(train), 20)
    assert (found == labels_of(held_out)).mean() < 0.2


@pytest.mark.parametrize("where", ["image", "objects", "ground"])
def test_colour_does_not_tell_the_class(train: list[Scene], held_out: list[Scene], where: str) -> None:
    def colours(scenes: list[Scene]) -> np.ndarray:
        rows = []
        for s in scenes:
            pixels = {"image": s.mask >= 0, "objects": s.mask > 0, "ground": s.mask == 0}[where]
            rows.append(np.concatenate([s.image[pixels].mean(axis=0), s.image[pixels].std(axis=0)]))
        return np.stack(rows)

    x, y = colours(train), labels_of(train)
    centres = np.stack([x[y == k].mean(axis=0) for k in range(len(NAMES))])
    found = ((colours(held_out)[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (found == labels_of(held_out)).mean() < CHANCE + 0.08


def test_the_silhouette_tells_the_class(train: list[Scene], held_out: list[Scene]) -> None:
    def cut(scene: Scene) -> np.ndarray:
        rows, columns = np.nonzero(nearest_object(scene))
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        picture = Image.fromarray(nearest_object(scene).astype(np.uint8) * 255).crop(box)
        return np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() - 127

    found = vote(np.stack([cut(s) for s in train]), np.stack([cut(s) for s in held_out]), labels_of(train), 5)
    assert (found == labels_of(held_out)).mean() > 0.8


def test_the_objects_of_one_image_differ_in_colour(train: list[Scene]) -> None:
    between, within = [], []
    for scene in train[:300]:
        levels = np.unique(scene.depth[scene.mask > 0])
        means = np.stack([scene.image[scene.depth == level].mean(axis=0) for level in levels])
        within.append(means.var(axis=0, ddof=1).mean() if len(means) > 1 else np.nan)
        between.append(means[0])
    assert np.nanmean(within) > 0.6 * np.var(between, axis=0).mean()


def test_classes_have_the_same_share(train: list[Scene]) -> None:
    assert (np.bincount(labels_of(train)) == TRAIN // len(NAMES)).all()
