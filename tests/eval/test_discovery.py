"""Object discovery: cuts of small graphs against all cuts, boxes and CorLoc against loops."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.eval._dense import DenseBackbone
from dinokit.eval.discovery import (
    FAR,
    Config,
    centre_box,
    evaluate,
    find_box,
    foreground,
    second_eigenvector,
)

SCENES = {"name": "scenes", "size": 64, "split": "test", "test_count": 6}


def config(**values):
    return Config(**section_values("eval", "discovery", values, ""))


def maps(mask, noise=0.1, width=8):
    """Features (D, h, w): one direction on the object, another elsewhere, and noise."""
    torch.manual_seed(0)
    axes = torch.eye(width)[:2]
    x = torch.where(torch.as_tensor(mask)[None], axes[0][:, None, None], axes[1][:, None, None])
    return x + noise * torch.randn_like(x)


def rectangle(size, top, left, bottom, right):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_the_object_of_a_known_map_is_found():
    mask = rectangle((9, 12), 2, 5, 6, 9)
    assert (foreground(maps(mask), 0.2) == mask).all()


def test_of_two_parts_one_is_the_object():
    two = rectangle((9, 12), 1, 1, 4, 4) | rectangle((9, 12), 5, 7, 8, 11)
    found = foreground(maps(two), 0.2)
    assert found.sum() in (9, 12)
    assert (found <= two).all()


def test_patches_that_are_all_alike_are_not_divided():
    assert foreground(torch.ones(4, 3, 5), 0.2).all()


def normalised_cut(weights, side):
    """The value that normalised cuts minimise (Shi and Malik, 2000), by loops."""
    n = len(weights)
    between = sum(weights[i][j] for i in range(n) for j in range(n) if side[i] and not side[j])
    sums = [sum(weights[i][j] for i in range(n) for j in range(n) if side[i] == s) for s in (True, False)]
    return between / sums[0] + between / sums[1]


def test_the_division_is_the_smallest_of_all_normalised_cuts():
    mask = rectangle((3, 4), 0, 1, 2, 3)
    patches = maps(mask)
    x = torch.nn.functional.normalize(patches.flatten(1).T, dim=1)
    weights = [[1.0 if float(a @ b) > 0.2 else FAR for b in x] for a in x]
    sides = [(True, *rest) for rest in itertools.product((True, False), repeat=11) if not all(rest)]
    best = min(sides, key=lambda side: normalised_cut(weights, side))
    found = foreground(patches, 0.2).ravel()
    assert found.tolist() in (list(best), [not s for s in best])


def test_the_eigenvector_is_that_of_the_generalised_problem():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, (20, 20))
    weights += weights.T
    degree = np.diag(weights.sum(axis=1))
    _, want = scipy.linalg.eigh(degree - weights, degree)
    got = second_eigenvector(torch.from_numpy(weights)).numpy()
    assert got * np.sign(got[0] * want[0, 1]) == pytest.approx(want[:, 1], abs=1e-9)


def test_the_centre_box_has_its_share_of_each_side():
    assert centre_box((100, 200), 0.5) == (50, 25, 150, 75)


BOXES = ((8, 8, 24, 40), (20, 4, 44, 16), None)


@pytest.fixture
def painted(tmp_path):
    """Black images with one bright rectangle, and an image without any."""
    for index, box in enumerate(BOXES):
        ids = np.zeros((48, 56), np.uint8)
        if box:
            ids[box[1] : box[3], box[0] : box[2]] = 1
        for name, values in (("images", ids * 255), ("masks", ids)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / name / f"{index}.png")
    folders = {"name": "folders", "path": str(tmp_path), "classes": ["background", "object"]}
    return {"name": "maps", "maps": folders}


@pytest.mark.parametrize(("resize", "exact"), [(0, True), (96, True), (37, False)])
def test_a_box_is_in_pixels_of_the_image_as_stored(backbone, painted, resize, exact):
    dense = DenseBackbone(backbone, [-1], "fp32")
    source = registry.build("data.objects", config(test=painted).test)
    for index, box in enumerate(BOXES[:2]):
        found = find_box(Config(resize=resize), dense, source[index][0])
        assert found == pytest.approx(box, abs=1e-6 if exact else 5)


def test_features_that_are_not_finite_are_refused():
    vit = {"name": "vit", "size": 32, "width": 32, "depth": 1, "heads": 2, "patch": 8}
    broken = registry.build("models", vit).eval()
    image = Image.new("RGB", (32, 32))
    find_box(Config(), DenseBackbone(broken, [0], "fp32"), image)
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="are not finite: the weights are broken"):
        find_box(Config(), DenseBackbone(broken, [0], "fp32"), image)


def test_an_image_of_too_many_patches_is_refused(backbone):
    dense = DenseBackbone(backbone, [-1], "fp32")
    with pytest.raises(ValueError, match=r"500 x 440 pixels has 13,750 patches.*give resize=N"):
        find_box(Config(), dense, Image.new("RGB", (500, 440)))


def test_images_without_an_object_are_counted_apart(backbone, painted):
    got = evaluate(config(test=painted), backbone)
    assert got == {"CorLoc": 1, "IoU": pytest.approx(1), "images_test": 2, "images_empty": 1}
    with pytest.raises(ValueError, match=r"No test image \(maps\) has an object"):
        evaluate(config(test={**painted, "min_area": 4000}), backbone)


def test_scores_are_those_of_a_loop(backbone):
    cfg = config(test=SCENES)
    source, dense = registry.build("data.objects", SCENES), DenseBackbone(backbone, [-1], "fp32")
    best = []
    for index in range(len(source)):
        image, objects = source[index]
        x0, y0, x1, y1 = find_box(cfg, dense, image)
        values = []
        for number in range(len(objects)):
            rows, columns = np.nonzero(objects.mask(number))
            a, b, c, d = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            both = max(0, min(x1, c) - max(x0, a)) * max(0, min(y1, d) - max(y0, b))
            values.append(both / ((x1 - x0) * (y1 - y0) + (c - a) * (d - b) - both))
        best.append(max(values))
    got = evaluate(cfg, backbone)
    assert got["CorLoc"] == pytest.approx(sum(value >= 0.5 for value in best) / len(best))
    assert got["IoU"] == pytest.approx(sum(best) / len(best))


def test_the_centre_box_needs_no_patches():
    pixels = registry.build("models", {"name": "pixels"}).eval()
    assert 0 < evaluate(config(method="centre", test=SCENES), pixels)["IoU"] < 0.7
    with pytest.raises(ValueError, match="raw_patches"):
        evaluate(config(test=SCENES), pixels)


def test_wrong_settings_get_words():
    with pytest.raises(ValueError, match=r"threshold=2.*from -1 to below 1"):
        config(threshold=2.0, test=SCENES)
    with pytest.raises(ValueError, match=r"share=0\.0: it must be above 0"):
        config(method="centre", share=0.0, test=SCENES)
    with pytest.raises(ValueError, match="threshold: only with method=tokencut"):
        config(method="centre", threshold=0.1, test=SCENES)


@pytest.fixture
def backbone():
    return registry.build("models", {"name": "raw_patches", "size": 32, "patch": 4, "cell": 2}).eval()
