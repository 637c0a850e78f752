"""Scores of segmentation by example: hand counts, known answers, and the baselines."""

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.predictions import NAME, Predictions
from dinokit.eval.in_context import Config, evaluate, scores
from dinokit.features import fingerprint
from dinokit.segment.encoder import Encoder
from dinokit.segment.in_context import InContextHead
from dinokit.segment.recipe import Context
from dinokit.segment.saved import SavedHead, save_head

SCENES = {"name": "scenes", "size": 32, "split": "test", "test_count": 30, "kinds": ["bars", "dots", "net"]}

TRAINED = {"name": "scenes", "size": 32, "split": "train", "count": 12}


@pytest.fixture
def backbone():
    return registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}).eval()


def config(**values):
    common = {"test": SCENES, "episodes": 12, "min_area": 20}
    return Config(**section_values("eval", "in_context", {**common, **values}, ""))


def test_a_class_counts_its_episodes_together_and_classes_count_alike():
    nan = float("nan")
    rows = [[0, 10, 20, 80, 90, 0.5], [0, 90, 100, 10, 20, nan], [3, 0, 10, 50, 100, -0.1]]
    found = scores(torch.tensor(rows))
    assert found["mIoU"] == pytest.approx((100 / 120 + 0) / 2)  # not the mean of 0.5, 0.9 and 0
    assert found["FB-IoU"] == pytest.approx((100 / 130 + 140 / 210) / 2)
    assert found["swap"] == pytest.approx(0.2)
    assert "swap" not in scores(torch.tensor([rows[1]]))


def test_everything_as_the_answer_is_the_share_of_the_class_and_deaf_to_examples(backbone):
    found = evaluate(config(method="all"), backbone)
    assert 0.05 < found["mIoU"] < 0.6
    assert found["swap"] == 0
    assert found["episodes"] == 12


@pytest.mark.gpu
def test_everything_is_an_answer_on_a_gpu_too(backbone):
    assert evaluate(config(method="all"), backbone.cuda())["swap"] == 0


@pytest.mark.parametrize("method", ["knn", "prototype"])
def test_baselines_need_no_head(backbone, method):
    found = evaluate(config(method=method, shots=2), backbone)
    assert 0 < found["mIoU"] < 1
    assert found == evaluate(config(method=method, shots=2), backbone)


def test_a_head_is_evaluated(backbone, tmp_path):
    encoder = Encoder(backbone, 32)
    head = InContextHead(encoder.width, Context(width=16, hidden=8))
    about = SavedHead("in_context", {"width": 16, "hidden": 8}, 32, 1, fingerprint(backbone), TRAINED, 0)
    save_head(tmp_path / "head.safetensors", head, about)
    assert {"mIoU", "FB-IoU"} <= evaluate(config(head=str(tmp_path)), backbone).keys()
    with pytest.raises(ValueError, match="test images are train images too, such as scenes train"):
        evaluate(config(head=str(tmp_path), test=TRAINED), backbone)
    allowed = evaluate(config(head=str(tmp_path), test=TRAINED, overlap="allow"), backbone)
    assert "mIoU_optimistic" in allowed
    with pytest.raises(ValueError, match="a head of kind in_context; this needs one of kind promptable"):
        registry.find("eval", "promptable").evaluate(
            registry.find("eval", "promptable").Config(head=str(tmp_path), test=SCENES), backbone
        )


def test_a_few_episodes_are_kept_for_a_report(backbone, tmp_path):
    """The example is on the left, with what it marks as its truth; on the right is the answer."""
    evaluate(config(method="all", out=str(tmp_path)), backbone)
    found = Predictions.read(tmp_path / NAME)
    assert found.classes == ["rest", "the class of the example"]
    assert len(found.samples) == 4
    for sample in found.samples:
        assert sample.image.shape == (112, 224, 3)
        assert (sample.predicted[:, :112] == -1).all()
        assert (sample.predicted[:, 112:] == 1).all()
        assert set(sample.truth[:, :112].ravel()) == {0, 1}
        assert set(sample.truth[:, 112:].ravel()) == {0, 1}
        assert sample.name.startswith(("bars", "dots", "net"))


def test_a_head_must_be_given(backbone):
    with pytest.raises(ValueError, match="head=RUN must be given"):
        evaluate(config(), backbone)
