"""Scores against scikit-learn's and torchmetrics', and by hand."""

import pytest
import torch
from sklearn import metrics
from torchmetrics.functional.classification import multilabel_average_precision

from dinokit.eval._metrics import accepted_share, average_precision, class_scores, mean_average_precision


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_top_1_top_5_and_the_mean_over_classes_are_scikit_learns():
    logits, y = random(300, 9), random(300, seed=1).mul(2).abs().long().clamp(max=7)  # class 8 has no image
    scores = class_scores(logits, y)
    for k in (1, 5):
        other = metrics.top_k_accuracy_score(y.numpy(), logits.numpy(), k=k, labels=range(9))
        assert scores[f"top{k}"] == pytest.approx(other)
    recall = metrics.recall_score(
        y.numpy(), logits.argmax(1).numpy(), labels=y.unique().numpy(), average="macro"
    )
    assert scores["mean_per_class"] == pytest.approx(recall)


def test_of_five_classes_or_fewer_nobody_asks_for_the_first_five():
    assert set(class_scores(random(10, 5), torch.zeros(10, dtype=torch.int64))) == {"top1", "mean_per_class"}


@pytest.mark.parametrize("digits", [7, 1, 0])  # with fewer digits more scores are equal
def test_average_precision_is_scikit_learns(digits):
    scores, positive = random(200).mul(10**digits).round(), random(200, seed=1) > 0.7
    other = metrics.average_precision_score(positive.numpy(), scores.numpy())
    assert average_precision(scores, positive) == pytest.approx(other)


def test_mean_average_precision_is_that_of_torchmetrics():
    logits, truth = random(80, 6), random(80, 6, seed=1) > 0.5
    other = multilabel_average_precision(logits, truth.long(), num_labels=6)
    assert mean_average_precision(logits, truth) == pytest.approx(other.item(), abs=1e-6)


def test_any_accepted_class_will_do_and_images_without_one_do_not_count():
    logits = torch.eye(4)[[0, 1, 2, 3]]
    accepted = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    assert accepted_share(logits, accepted) == pytest.approx(2 / 3)
