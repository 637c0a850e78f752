"""The built-in scenes: what tells their classes apart, and what must not."""

import numpy as np
import pytest

from dinokit.data.scenes import NAMES, Scene, World
from dinokit.data.scenes.materials import KINDS, PERIODS, TILE, material_pictures

TRAIN, TEST = 800, 400
CHANCE = 1 / len(NAMES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    world = World(split="train")
    return [world.scene(index) for index in range(TRAIN + TEST)]


@pytest.fixture(scope="module")
def labels(scenes: list[Scene]) -> np.ndarray:
    return np.array([scene.label for scene in scenes])


def accuracy(features: np.ndarray, labels: np.ndarray, k: int = 20) -> float:
    """Of a vote of the k nearest of the first TRAIN rows, by cosine, for the others."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = np.argsort(-x[TRAIN:] @ x[:TRAIN].T, axis=1)[:, :k]
    found = np.array([np.bincount(labels[row]).argmax() for row in nearest])
    return float((found == labels[TRAIN:]).mean())


def averaged(scenes: list[Scene], side: int) -> np.ndarray:
    images = np.stack([scene.image for scene in scenes]).astype(np.float32) - 127.5
    cell = images.shape[1] // side
    return images.reshape(len(images), side, cell, side, cell, 3).mean(axis=(2, 4)).reshape(len(images), -1)


@pytest.mark.parametrize("side", [16, 64])
def test_pixels_do_not_tell_the_class(scenes: list[Scene], labels: np.ndarray, side: int) -> None:
    assert accuracy(averaged(scenes, side), labels) < 0.25


def test_the_outlines_of_all_objects_together_do_not_tell_the_class(
    scenes: list[Scene], labels: np.ndarray
) -> None:
    masks = np.stack([scene.mask > 0 for scene in scenes]).reshape(len(scenes), -1).astype(np.float32)
    assert accuracy(masks - 0.5, labels) < 0.3


@pytest.mark.parametrize("where", ["image", "objects", "ground"])
def test_colours_do_not_tell_the_class(scenes: list[Scene], labels: np.ndarray, where: str) -> None:
    rows = []
    for s in scenes:
        pixels = {"image": s.mask >= 0, "objects": s.mask > 0, "ground": s.mask == 0}[where]
        rows.append(np.concatenate([s.image[pixels].mean(axis=0), s.image[pixels].std(axis=0)]))
    statistics = np.stack(rows)
    statistics = (statistics - statistics.mean(axis=0)) / statistics.std(axis=0)
    assert accuracy(statistics[:, :3], labels) < 0.25
    assert accuracy(statistics, labels) < 0.25


def test_the_material_tells_the_class(scenes: list[Scene], labels: np.ndarray) -> None:
    """Power spectra of a window on the nearest object, which contain no colour and no position."""
    rows = []
    for scene in scenes:
        y, x = (int(side.mean()) for side in np.nonzero(scene.instances == 1))
        y, x = np.clip([y, x], 10, 53)
        grey = scene.image[y - 10 : y + 10, x - 10 : x + 10].astype(float).mean(axis=2)
        power = np.abs(np.fft.rfft2((grey - grey.mean()) * np.outer(np.hanning(20), np.hanning(20))))
        spectrum = np.log1p(power / power.sum() * 100)
        rows.append(spectrum)
    spectra = np.stack(rows).reshape(len(scenes), -1)
    assert accuracy(spectra - spectra.mean(axis=0), labels) > 0.5


def test_the_objects_of_an_image_differ_in_colour(scenes: list[Scene]) -> None:
    between, within = [], []
    for scene in scenes[:300]:
        numbers = np.unique(scene.instances[scene.instances > 0])
        means = np.stack([scene.image[scene.instances == number].mean(axis=0) for number in numbers])
        within.append(means.var(axis=0, ddof=1).mean() if len(means) > 1 else np.nan)
        between.append(means[0])
    assert np.nanmean(within) > 0.6 * np.var(between, axis=0).mean()


def test_a_material_repeats_at_its_edges_and_has_both_colours() -> None:
    pictures = material_pictures()
    assert pictures.shape == (len(KINDS), 3, TILE, TILE)
    steps = np.abs(np.diff(pictures[:, 0], axis=1)).max(axis=(1, 2))
    seam = np.abs(pictures[:, 0, 0] - pictures[:, 0, -1]).max(axis=1)
    assert (seam <= steps + 1e-3).all()
    assert (pictures.mean(axis=(1, 2, 3)) > 0.25).all()
    assert (pictures.mean(axis=(1, 2, 3)) < 0.75).all()
    period = TILE // PERIODS
    for kind in ("bars", "checks", "dots", "rings", "zigzag", "bands", "net"):
        picture = pictures[NAMES.index(kind), 0]
        assert np.allclose(picture, np.roll(picture, (period, period), axis=(0, 1)), atol=0.02)


def test_classes_have_the_same_share(labels: np.ndarray) -> None:
    assert (np.bincount(labels) == (TRAIN + TEST) // len(NAMES)).all()
