"""Scores of prompts: click curves of known methods, and the baselines."""

import numpy as np
import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.predictions import NAME, Predictions
from dinokit.eval.promptable import (
    Baseline,
    Config,
    click_curve,
    disc,
    evaluate,
    flood,
    image_scores,
    overlaps,
)
from dinokit.features import fingerprint
from dinokit.segment.encoder import Encoder
from dinokit.segment.promptable import PromptableHead
from dinokit.segment.recipe import Head
from dinokit.segment.saved import SavedHead, save_head

SCENES = {"name": "scenes", "size": 48, "split": "test", "test_count": 6}
TRAINED = {"name": "scenes", "size": 48, "split": "train", "count": 6}


def squares(*boxes, size=(30, 40)):
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x, y, side) in zip(masks, boxes, strict=True):
        mask[y : y + side, x : x + side] = True
    return masks


class Growing:
    """Gives a share of the truth that grows with the clicks: .5, .8, .86, .91, and so on."""

    shares = (0.5, 0.8, 0.86, 0.91, 0.91, 0.95)

    def __init__(self, truth):
        self.truth, self.asked = truth, []

    def image(self, image):
        pass

    def click(self, points, signs, rows):
        self.asked.append(rows.tolist())
        masks = []
        for row in rows:
            mask, n = np.zeros_like(self.truth[row]), points.shape[1]
            flat = np.flatnonzero(self.truth[row])
            share = self.shares[min(n, len(self.shares)) - 1] if row == 0 else 0.5
            mask.flat[flat[: round(share * len(flat))]] = True
            masks.append(mask)
        return np.stack(masks), np.full(len(rows), 0.4)

    def box(self, boxes):
        return self.truth


def test_the_clicks_of_a_known_curve_are_counted():
    truth = squares((2, 3, 10), (20, 10, 10))
    method = Growing(truth)
    scores, first = image_scores(Config(head="x", clicks=20), method, truth)
    assert (first.sum(axis=(1, 2)) == 50).all()
    assert scores["mIoU@1"] == [0.5, 0.5]
    assert scores["mIoU@3"] == pytest.approx([0.86, 0.5])
    assert scores["NoC@80"] == [2, 20]
    assert scores["NoC@85"] == [3, 20]
    assert scores["NoC@90"] == [4, 20]
    assert scores["failed@90"] == [0, 1]
    assert scores["quality error"] == pytest.approx([0.1, 0.1])
    assert scores["mIoU box"] == [1, 1]
    assert scores["same object"] == [1, 1]
    assert scores["other objects"] == [0]
    assert method.asked[5] == [1]  # the first is good enough, and gets no more clicks


def test_a_perfect_mask_stays_perfect():
    truth = squares((2, 3, 10))

    class Perfect(Growing):
        shares = (1.0,)

    curve, _, _ = click_curve(Perfect(truth), truth, 7)
    assert (curve == 1).all()


def test_overlaps_by_hand():
    a, b = squares((0, 0, 4), (5, 5, 2)), squares((2, 0, 4), (9, 9, 2))
    assert overlaps(a, b).tolist() == pytest.approx([8 / 24, 0])
    empty = np.zeros_like(a)
    assert overlaps(empty, empty).tolist() == [1, 1]


def test_regions_of_the_baselines():
    pixels = np.zeros((9, 9, 3), np.float32)
    pixels[2:5, 2:5] = pixels[7, 7] = 200
    assert (
        np.argwhere(flood(20)(pixels, 3, 3)).tolist()
        == np.argwhere(pixels[..., 0] * (np.arange(9) < 6)).tolist()
    )
    assert disc(1.0)(pixels, 4, 4).sum() == 5
    method = Baseline(disc(1.0))
    method.image(pixels)
    masks, _ = method.click(np.array([[[4.0, 4.0], [4.0, 5.0]]]), np.array([[1, 0]]), np.array([0]))
    assert masks[0].sum() == 3  # the second disc takes two of the five pixels, its neighbour and itself
    assert method.box(np.array([[1, 2, 4, 6]])).sum() == 12
    round_box = Baseline(disc(1.0), round_box=True)
    round_box.image(np.zeros((100, 100, 3)))
    assert round_box.box(np.array([[10, 20, 90, 80]])).sum() == pytest.approx(np.pi / 4 * 80 * 60, rel=0.01)


def config(**values):
    return Config(**section_values("eval", "promptable", values, ""))


@pytest.mark.parametrize("method", ["blob", "flood", "box", "ellipse"])
def test_baselines_need_no_head(backbone, method):
    few = {"max_train": 5} if method in ("blob", "flood") else {}
    scores = evaluate(config(method=method, test=SCENES, **few), backbone)
    key = "mIoU box" if method in ("box", "ellipse") else "mIoU@1"
    assert 0.1 < scores[key] < 0.95
    assert scores["images_test"] == 6
    assert scores["objects_test"] > 6


def test_a_head_is_evaluated_at_the_size_of_the_image(backbone, tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(backbone, 32)
    head = PromptableHead(encoder.width, Head(hidden=32))
    about = SavedHead("promptable", {"hidden": 32}, 32, 1, fingerprint(backbone), TRAINED, 0)
    save_head(tmp_path / "head.safetensors", head, about)
    scores = evaluate(config(head=str(tmp_path), test=SCENES, clicks=6), backbone)
    assert scores["mIoU@1"] < 0.5  # it is not trained
    assert {"mIoU box", "NoC@90", "quality error", "same object", "other objects"} <= scores.keys()
    assert scores == evaluate(config(head=str(tmp_path), test=SCENES, clicks=6), backbone)
    with pytest.raises(ValueError, match="test images are train images too, such as scenes train"):
        evaluate(config(head=str(tmp_path), test=TRAINED), backbone)


@pytest.mark.parametrize("method", ["blob", "ellipse"])
def test_a_few_images_are_kept_for_a_report(backbone, tmp_path, method):
    few = {"max_train": 5} if method == "blob" else {}
    scores = evaluate(config(method=method, test=SCENES, out=str(tmp_path), **few), backbone)
    found, source = Predictions.read(tmp_path / NAME), registry.build("data.objects", SCENES)
    assert len(found.samples) == 4
    reached = []
    for sample in found.samples:
        _, objects = source[[source.name(i) for i in range(6)].index(sample.name)]
        masks = [objects.mask(number) for number in objects.chosen(24)][:12]
        seen = sample.truth.reshape(-1)
        assert set(seen) <= set(range(len(masks) + 1))
        share = np.mean(np.any(masks, axis=0))
        assert np.mean(seen > 0) == pytest.approx(share, abs=0.02)
        a, b = sample.truth > 0, sample.predicted > 0
        reached.append((a & b).sum() / (a | b).sum())
    key = "mIoU@1" if method == "blob" else "mIoU box"
    assert np.mean(reached) == pytest.approx(scores[key], abs=0.25)


@pytest.mark.parametrize(
    ("objects", "why"),
    [
        ({"name": "sa1b", "path": "nowhere"}, "nowhere"),
        ({"name": "evil.images"}, "importing it would run its code"),
    ],
)
def test_training_images_of_a_head_that_cannot_be_opened_are_said(backbone, tmp_path, capsys, objects, why):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    encoder = Encoder(backbone, 32)
    about = SavedHead("promptable", {"hidden": 32}, 32, 1, fingerprint(backbone), objects, 0)
    save_head(tmp_path / "head.safetensors", PromptableHead(encoder.width, Head(hidden=32)), about)
    few = {**SCENES, "test_count": 1}
    assert "mIoU@1" in evaluate(config(head=str(tmp_path), test=few, clicks=5), backbone)
    text = "".join(capsys.readouterr())
    assert "were not compared with the test images" in text
    assert why in text


def test_wrong_settings_get_words(backbone):
    with pytest.raises(ValueError, match="head=RUN must be given"):
        evaluate(config(test=SCENES), backbone)
    with pytest.raises(ValueError, match=r"head: only with method=trained"):
        config(method="blob", head="x", test=SCENES)
    with pytest.raises(ValueError, match=r"train: only with method=blob or"):
        config(method="box", train=SCENES, test=SCENES)
    with pytest.raises(ValueError, match="No test image has an object of min_area=4000"):
        evaluate(config(method="box", test=SCENES, min_area=4000), backbone)
    with pytest.raises(LookupError, match="There is no head"):
        evaluate(config(head="nowhere", test=SCENES), backbone)


@pytest.fixture
def backbone():
    return registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}).eval()
