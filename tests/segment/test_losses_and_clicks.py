"""Losses of masks against numbers worked out by hand, and simulated clicks against brute force."""

import math

import numpy as np
import pytest
import torch

from dinokit.eval.promptable import deepest_click, depth_inside
from dinokit.segment.losses import answer_loss, dice_loss, iou, mask_loss
from dinokit.segment.promptable import Answer
from dinokit.segment.prompts import boxes_of
from dinokit.segment.recipe import Losses
from dinokit.segment.rounds import first_clicks, next_clicks, noisy_boxes, random_pixels


@pytest.mark.parametrize(
    ("logit", "truth", "value"),
    [(0.0, 1.0, 0.0433217), (0.0, 0.0, 0.1299651), (2.0, 1.0, 4.50891e-4), (2.0, 0.0, 1.2375586)],
)
def test_focal_loss_of_one_cell(logit, truth, value):
    weights = Losses(focal=1, alpha=0.25, gamma=2, dice=0)
    loss = mask_loss(torch.tensor([[logit]]), torch.tensor([[truth]]), weights)
    assert loss.item() == pytest.approx(value, rel=1e-5)


def test_by_default_the_focal_loss_is_cross_entropy():
    logits, truth = torch.randn(3, 7), (torch.rand(3, 7) > 0.5).float()
    ours = mask_loss(logits, truth, Losses(focal=1, dice=0))
    rows = [
        sum(-math.log(1 / (1 + math.exp(-(x if t else -x)))) for x, t in zip(a, b, strict=True)) / 7
        for a, b in zip(logits.tolist(), truth.tolist(), strict=True)
    ]
    assert ours.tolist() == pytest.approx(rows, rel=1e-5)


def test_dice_loss_of_known_masks():
    assert dice_loss(torch.zeros(4), torch.tensor([1.0, 1, 0, 0])).item() == pytest.approx(0.4)
    assert dice_loss(torch.full((4,), -50.0), torch.zeros(4)).item() == pytest.approx(0)


def test_overlap_of_masks():
    a, b = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]) > 0, torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]) > 0
    assert iou(a, b).tolist() == pytest.approx([1 / 3, 1])


def answer_of(masks, quality):
    return Answer(torch.where(masks, 20.0, -20.0), torch.tensor(quality, requires_grad=True))


def test_of_several_answers_the_best_one_is_trained_and_the_single_one_always():
    truth = torch.zeros(1, 8, 8, dtype=torch.bool)
    truth[:, 2:6, 2:6] = True
    other = torch.zeros_like(truth)
    masks = torch.stack([truth[0], other[0], truth[0]])[None]
    perfect = answer_loss(answer_of(masks, [[1.0, 0.0, 1.0]]), truth, Losses(), several=True)
    assert perfect.loss.item() == pytest.approx(0, abs=1e-4)
    assert (perfect.iou.item(), perfect.best.item()) == (1, 1)
    single_wrong = torch.stack([other[0], truth[0], truth[0]])[None]
    wrong = answer_loss(answer_of(single_wrong, [[0.0, 1.0, 1.0]]), truth, Losses(), several=True)
    assert wrong.loss.item() > 5
    assert (wrong.iou.item(), wrong.best.item()) == (0, 1)


def test_the_quality_learns_the_overlap():
    truth = torch.ones(1, 4, 4, dtype=torch.bool)
    logits = torch.full((1, 1, 4, 4), 20.0)
    quality = torch.tensor([[0.0]], requires_grad=True)
    parts = answer_loss(Answer(logits, quality), truth, Losses(focal=0, dice=0, quality=1), several=False)
    assert parts.loss.item() == pytest.approx(1)
    parts.loss.backward()
    assert quality.grad.item() == pytest.approx(-2)


def brute_depth(mask):
    """Distances to the nearest pixel outside, those beyond the edge included, by comparing all pairs."""
    ring = np.pad(mask, 1)
    outside = np.argwhere(~ring)
    result = np.zeros(mask.shape)
    for y, x in np.argwhere(mask):
        result[y, x] = math.sqrt(((outside - [y + 1, x + 1]) ** 2).sum(axis=1).min())
    return result


def test_depth_is_the_distance_to_the_nearest_pixel_outside():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((9, 11)) < 0.7
        np.testing.assert_allclose(depth_inside(mask), brute_depth(mask))
    small = blocks((3, 12, 4), (9, 14, 2))
    np.testing.assert_allclose(depth_inside(small), brute_depth(small))


def blocks(*boxes, size=(20, 20)):
    mask = np.zeros(size, bool)
    for x, y, side in boxes:
        mask[y : y + side, x : x + side] = True
    return mask


def test_the_evaluated_click_is_the_deepest_of_the_larger_error():
    none = np.zeros((20, 20), bool)
    assert deepest_click(blocks((2, 3, 5)), none) == (4, 5, 1)
    assert deepest_click(blocks((2, 3, 5), (10, 10, 3)), none) == (4, 5, 1)
    assert deepest_click(blocks((1, 1, 3), (10, 10, 3)), none) == (2, 2, 1)  # equal: the first
    assert deepest_click(blocks((2, 3, 3)), blocks((10, 10, 5))) == (12, 12, 0)
    assert deepest_click(blocks((2, 3, 5)), blocks((10, 10, 5)))[2] == 0  # equally deep: negative
    assert deepest_click(blocks((2, 3, 1)), none) == (2, 3, 1)
    assert deepest_click(none, none) is None
    clicked = none.copy()
    clicked[3, 2] = True
    assert deepest_click(blocks((2, 3, 1)), none, clicked) is None


def test_a_random_pixel_is_in_its_region_and_any_of_it():
    region = torch.zeros(1, 4, 5, dtype=torch.bool)
    region[0, 1, 2] = region[0, 3, 0] = region[0, 3, 4] = True
    draws = (torch.arange(300) + 0.5) / 300
    points, found = random_pixels(region.expand(300, -1, -1), draws)
    assert found.all()
    counts = {
        tuple(p): n
        for p, n in zip(*(x.tolist() for x in points.unique(dim=0, return_counts=True)), strict=True)
    }
    assert counts == {(2, 1): 100, (0, 3): 100, (4, 3): 100}
    assert not random_pixels(torch.zeros(1, 4, 5, dtype=torch.bool), torch.zeros(1))[1]


def test_training_clicks_go_to_errors_with_their_sign():
    torch.manual_seed(0)
    truth, predicted = (torch.rand(50, 6, 6) > 0.5 for _ in range(2))
    image = torch.zeros_like(truth)
    image[:, :4] = True  # below it is padding
    truth &= image
    points, signs = next_clicks(truth, predicted, image, torch.rand(50))
    x, y = points.long().unbind(1)
    rows = torch.arange(50)
    assert ((truth ^ predicted) & image)[rows, y, x].all()
    assert (signs == truth[rows, y, x].long()).all()
    perfect, sign = next_clicks(truth, truth, image, torch.rand(50))
    assert (~truth & image)[rows, perfect[:, 1].long(), perfect[:, 0].long()].all()
    assert not sign.any()
    first, sign = first_clicks(truth, torch.rand(50))
    assert truth[rows, first[:, 1].long(), first[:, 0].long()].all()
    assert (sign == 1).all()


def test_boxes_are_half_open_and_noise_is_limited():
    masks = torch.zeros(2, 9, 9, dtype=torch.bool)
    masks[0, 4, 3] = masks[1, 2:5, 1:8] = True
    boxes = boxes_of(masks)
    assert boxes.tolist() == [[3, 4, 4, 5], [1, 2, 8, 5]]
    moved = noisy_boxes(boxes, torch.tensor([[9.0, 9, -9, -9], [1, -1, 100, 100]]), 9)
    assert (moved[:, 2:] > moved[:, :2]).all()
    assert moved[1].tolist() == pytest.approx([1.7, 1.7, 9, 9])
