"""What evaluators show of an image, on images whose pixels say where they were."""

import numpy as np
import pytest
import torch
from torchvision import transforms

from dinokit.data.transforms import CenterCrop, RandomResizedCrop, ResizeLongerSide, center_crop


def places(height=60, width=90):
    """Pixel (y, x) has the colours (y, x, 0)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.mgrid[:height, :width]
    return image


def test_the_middle_is_the_centre_crop_in_every_draw():
    assert torch.equal(CenterCrop(40, 32)(places(), 3, 9), center_crop(places(), 40, 32))


def test_a_part_is_a_function_of_seed_draw_and_image_alone():
    transform = RandomResizedCrop(16, seed=1)
    again = transform(places(), 5, 2)
    assert again.shape == (3, 16, 16)
    assert again.dtype == torch.uint8
    assert torch.equal(again, RandomResizedCrop(16, seed=1)(places(), 5, 2))
    for other in (
        transform(places(), 5, 3),
        transform(places(), 6, 2),
        RandomResizedCrop(16, seed=2)(places(), 5, 2),
    ):
        assert not torch.equal(again, other)


def test_parts_have_the_share_of_the_area_that_was_asked_for_and_half_are_mirrored():
    torch.manual_seed(0)
    shares, mirrored = [], 0
    for draw in range(300):
        crop = RandomResizedCrop(24)(places(), 0, draw).float()
        mirrored += bool(crop[1, 0, 0] > crop[1, 0, -1])
        spans = [float(crop[c].amax() - crop[c].amin()) for c in (0, 1)]
        shares.append(spans[0] * spans[1] / (59 * 89))
    boxes = [
        transforms.RandomResizedCrop.get_params(torch.empty(3, 60, 90), (0.08, 1.0), (0.75, 4 / 3))
        for _ in range(2000)
    ]
    other = np.mean([h * w / (60 * 90) for _, _, h, w in boxes])
    assert np.mean(shares) == pytest.approx(
        other * (23 / 24) ** 2, abs=0.04
    )  # from centre to centre of pixels
    assert 0.04 < min(shares) < 0.2
    assert 120 < mirrored < 180


def test_a_whole_image_keeps_its_shape_but_for_parts_of_a_patch():
    assert ResizeLongerSide(48, 8)(places(), 0, 0).shape == (3, 32, 48)
    assert ResizeLongerSide(50, 8)(places(), 0, 0).shape == (3, 32, 48)
    assert ResizeLongerSide(30, 16)(places(10, 90), 0, 0).shape == (3, 16, 16)  # never less than a patch


def test_a_box_is_cut_out_before_the_image_is_resized():
    crop = ResizeLongerSide(20, 4, {7: (30.0, 20.0, 50.0, 40.0)})(places(), 7, 0)
    assert crop.shape == (3, 20, 20)
    assert crop[:, 0, 0].tolist() == [20, 30, 0]
    assert crop[:, -1, -1].tolist() == [39, 49, 0]
    assert ResizeLongerSide(20, 4, {7: (30.0, 20.0, 50.0, 40.0)})(places(), 6, 0).shape == (3, 12, 20)
    with pytest.raises(ValueError, match="no pixel of image 7"):
        ResizeLongerSide(20, 4, {7: (95.0, 20.0, 99.0, 40.0)})(places(), 7, 0)
