"""Sliding windows, confusion, depth errors and losses against answers by hand or of another library."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from dinokit.data.dense import IGNORE
from dinokit.eval._dense import slide, windows
from dinokit.eval._metrics import DEPTH_CROPS, Confusion, depth_errors
from dinokit.eval.depth import gradient_loss, scale_invariant_loss


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.data())
def test_windows_cover_every_pixel_stay_inside_and_have_one_size(height, width, crop, data):
    stride = data.draw(st.integers(1, crop))
    seen = np.zeros((height, width), int)
    boxes = windows(height, width, (crop, crop), (stride, stride))
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (min(crop, height), min(crop, width))
        assert top >= 0
        assert left >= 0
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    assert len(set(boxes)) == len(boxes)


def test_windows_lie_where_the_published_test_has_them():
    # 512 at every 341 over 512 x 1000: two more starts, the last moved back to the border.
    assert [box[1] for box in windows(512, 1000, (512, 512), (341, 341))] == [0, 341, 488]


def test_a_pixel_gets_the_mean_of_the_windows_that_cover_it():
    image = torch.rand(3, 13, 17, generator=torch.Generator().manual_seed(0))
    calls = []

    def predict(x):
        calls.append(len(x))
        start = sum(calls[:-1])
        return torch.stack([torch.full(x.shape[2:], float(start + i)) for i in range(len(x))])[:, None]

    got = slide(image, 8, 5, predict, batch=2)[0]
    total, counts = np.zeros((13, 17)), np.zeros((13, 17))
    for number, (top, left, bottom, right) in enumerate(windows(13, 17, (8, 8), (5, 5))):
        total[top:bottom, left:right] += number
        counts[top:bottom, left:right] += 1
    assert got.numpy() == pytest.approx(total / counts)
    assert max(calls) == 2


def test_predictions_of_single_pixels_are_the_same_through_windows():
    image = torch.rand(3, 30, 41)
    assert torch.allclose(slide(image, 16, 10, lambda x: x * 2), image * 2)


def test_scores_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 5, (4, 20, 30), generator=generator)
    given_ = torch.where(
        torch.rand(truth.shape, generator=generator) < 0.6,
        truth.clamp_min(0),
        torch.randint(0, 6, truth.shape, generator=generator),
    )
    confusion = Confusion(7, torch.device("cpu"))  # class 5 is given and never true, class 6 neither
    for a, b in zip(given_, truth, strict=True):
        confusion.add(a, b)
    scores = confusion.scores("abcdefg")
    iou = MulticlassJaccardIndex(7, average=None, ignore_index=-1)(given_, truth)
    assert [scores[f"iou {n}"] for n in "abcdef"] == pytest.approx(iou[:6].tolist(), abs=1e-6)
    assert "iou g" not in scores
    assert scores["mIoU"] == pytest.approx(
        MulticlassJaccardIndex(7, ignore_index=-1)(given_, truth).item(), abs=1e-6
    )
    micro = MulticlassAccuracy(7, average="micro", ignore_index=-1)(given_, truth).item()
    assert scores["pixel accuracy"] == pytest.approx(micro, abs=1e-6)
    per_class = MulticlassAccuracy(7, average=None, ignore_index=-1)(given_, truth)
    assert scores["mean accuracy"] == pytest.approx(per_class[:5].mean().item(), abs=1e-6)


@pytest.mark.parametrize(("truth", "message"), [(IGNORE, "all ignored"), (1, "all of class 'b'")])
def test_pixels_of_one_class_are_refused(truth, message):
    confusion = Confusion(2, torch.device("cpu"))
    confusion.add(torch.zeros(3, 3, dtype=torch.int64), torch.full((3, 3), truth))
    with pytest.raises(ValueError, match=message):
        confusion.scores("ab")


def test_errors_of_a_depth_map_made_by_hand():
    truth = torch.tensor([[2.0, 4.0, 0.0], [8.0, 20.0, 1.0]])  # 0 has no reading, 20 lies beyond the range
    guess = torch.tensor([[2.2, 3.0, 5.0], [30.0, 1.0, 1.0]])  # 30 is cut down to 10
    pairs = [(2.2, 2.0), (3.0, 4.0), (10.0, 8.0), (1.0, 1.0)]
    got = depth_errors(guess, truth, 1e-3, 10.0)
    logs = [math.log(y / t) for y, t in pairs]
    want = {
        "a1": 2 / 4,  # 1.1 and 1; 4 / 3 is above, and 10 / 8 is 1.25 itself
        "a2": 1.0,
        "a3": 1.0,
        "abs_rel": sum(abs(y - t) / t for y, t in pairs) / 4,
        "sq_rel": sum((y - t) ** 2 / t for y, t in pairs) / 4,
        "rmse": math.sqrt(sum((y - t) ** 2 for y, t in pairs) / 4),
        "rmse_log": math.sqrt(sum(g**2 for g in logs) / 4),
        "log_10": sum(abs(math.log10(y / t)) for y, t in pairs) / 4,
        "silog": 100 * math.sqrt(sum(g**2 for g in logs) / 4 - (sum(logs) / 4) ** 2),
    }
    assert got == pytest.approx(want, rel=1e-6)


def test_silog_forgives_one_factor_and_rmse_does_not():
    truth = torch.rand(5, 5) + 1
    got = depth_errors(truth * 1.5, truth, 1e-3, 10.0)
    assert got["silog"] == pytest.approx(0, abs=1e-3)
    assert got["abs_rel"] == pytest.approx(0.5, rel=1e-5)


def test_a_map_without_a_reading_has_no_errors():
    assert depth_errors(torch.ones(3, 3), torch.zeros(3, 3), 1e-3, 10.0) is None


def test_depth_is_evaluated_inside_the_published_crops():
    assert DEPTH_CROPS["eigen"](480, 640) == (45, 471, 41, 601)
    assert DEPTH_CROPS["garg"](352, 1216) == (143, 349, 43, 1172)
    truth = torch.full((480, 640), 2.0)
    guess = torch.full((480, 640), 9.0)
    guess[45:471, 41:601] = 2.0
    assert depth_errors(guess, truth, 1e-3, 10.0, "eigen")["rmse"] == 0
    assert depth_errors(guess, truth, 1e-3, 10.0)["rmse"] > 1


def test_the_scale_invariant_loss_is_its_formula():
    rng = np.random.default_rng(0)
    truth, guess = rng.uniform(0.5, 5, (2, 1, 6, 7)), rng.uniform(0.5, 5, (2, 1, 6, 7))
    truth[0, 0, :3] = 0
    g = np.array(
        [
            math.log(a + 1e-3) - math.log(b + 1e-3)
            for a, b in zip(guess.flat, truth.flat, strict=True)
            if b > 0
        ]
    )
    late = scale_invariant_loss(torch.from_numpy(guess), torch.from_numpy(truth), 100 / 38_400)
    early = scale_invariant_loss(torch.from_numpy(guess), torch.from_numpy(truth), 99 / 38_400)
    assert late.item() == pytest.approx(math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2))
    assert early.item() == pytest.approx(math.sqrt(0.15) * abs(g.mean()))


def gradient_by_hand(guess, truth):
    """The definition, pixel by pixel."""
    total = 0.0
    for scale in (1, 2, 4, 6):
        a, b = guess[:, 0, ::scale, ::scale], truth[:, 0, ::scale, ::scale]
        images, height, width = a.shape
        d = np.log(a + 1e-3) - np.log(b + 1e-3)
        found = 0.0
        for n in range(images):
            for i in range(height):
                for j in range(width):
                    for k, m in ((i + 2, j), (i, j + 2)):
                        if k < height and m < width and b[n, i, j] > 0 and b[n, k, m] > 0:
                            found += abs(d[n, i, j] - d[n, k, m])
        total += found / max((b > 0).sum(), 1)
    return total


def test_the_gradient_loss_is_its_formula():
    rng = np.random.default_rng(0)
    truth, guess = rng.uniform(0.5, 5, (2, 1, 13, 15)), rng.uniform(0.5, 5, (2, 1, 13, 15))
    truth[rng.random(truth.shape) < 0.2] = 0
    got = gradient_loss(torch.from_numpy(guess), torch.from_numpy(truth)).item()
    assert got == pytest.approx(gradient_by_hand(guess, truth))


def test_the_reference_form_of_the_gradient_loss_sees_nothing_of_two_images():
    truth, guess = torch.rand(2, 1, 9, 9) + 1, torch.rand(2, 1, 9, 9) + 1
    assert gradient_loss(guess, truth, "reference") == 0
    truth, guess = torch.rand(3, 1, 9, 9) + 1, torch.rand(3, 1, 9, 9) + 1
    assert gradient_loss(guess, truth, "reference") > 0
    assert gradient_loss(guess, truth) > 0


def test_a_prediction_off_by_one_factor_has_no_gradient_error():
    truth = torch.rand(2, 1, 9, 9, dtype=torch.float64) + 1
    assert gradient_loss((truth + 1e-3) * 1.3 - 1e-3, truth).item() == pytest.approx(0, abs=1e-9)
