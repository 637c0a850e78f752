"""Crops: boxes against torchvision's rule and by counting, pixels against Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinokit.config.load import CropGroup, Crops
from dinokit.data.sampler import generator
from dinokit.data.sources import ImageLike
from dinokit.data.transforms import ATTEMPTS, MultiCrop, center_crop, random_box, resize, size_of, to_tensor


def photo(height: int = 90, width: int = 120, channels: int = 3) -> np.ndarray:
    """Smooth, without black and white, so that no resampling has to cut an overshoot off. (H, W, C) uint8."""
    rng = np.random.default_rng(0)
    planes = [
        Image.fromarray(rng.integers(60, 196, (9, 12), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for _ in range(channels)
    ]
    noise = rng.normal(0, 4, (height, width, channels))
    return np.clip(np.stack([np.array(plane) for plane in planes], axis=2) + noise, 0, 255).astype(np.uint8)


def small(**changes: object) -> Crops:
    groups = {"globals": CropGroup(size=32), "locals": CropGroup(count=3, size=16, scale=(0.05, 0.32))}
    return Crops(**{**groups, **changes})


def crops_of(cfg: Crops, image: ImageLike, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    crops = MultiCrop(cfg)
    return crops(image, crops.draw(*size_of(image), rng))


def boxes(width: int, height: int, scale: tuple[float, float], count: int = 3000) -> np.ndarray:
    rng = np.random.default_rng(0)
    draws = rng.random((count, 2 * ATTEMPTS + 2)).tolist()
    return np.array([random_box(width, height, scale, (0.75, 4 / 3), row) for row in draws])


@pytest.mark.parametrize(
    ("size", "box"), [(32, (10, 5, 80, 60)), (96, (0, 0, 120, 90)), (50, (3, 40, 21, 29))]
)
def test_a_crop_equals_pillows_crop_and_bicubic_resize_to_one_grey_level(
    size: int, box: tuple[int, int, int, int]
) -> None:
    image = photo()
    x, y, w, h = box
    theirs = Image.fromarray(image).crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
    mine = resize(to_tensor(image)[:, :, y : y + h, x : x + w], size, size)[0].permute(1, 2, 0).numpy()
    apart = np.abs(mine.astype(int) - np.asarray(theirs).astype(int))
    assert apart.max() <= 2
    assert (apart <= 1).mean() > 0.999


def test_boxes_lie_in_the_image_with_the_shares_and_shapes_asked_for() -> None:
    left, top, w, h = boxes(500, 375, (0.05, 0.32)).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert (left + w).max() <= 500
    assert (top + h).max() <= 375
    share, ratio = w * h / (500 * 375), w / h
    assert 0.048 < share.min() < 0.053
    assert 0.317 < share.max() < 0.325
    assert share.mean() == pytest.approx(0.185, abs=0.006)
    assert ratio.min() > 0.73
    assert ratio.max() < 1.37
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.012)


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(500, 375, (0.32, 1.0)), (100, 200, (0.32, 1.0)), (64, 64, (0.05, 0.32))]
)
def test_boxes_are_distributed_as_torchvisions(width: int, height: int, scale: tuple[float, float]) -> None:
    """The box's mean corners and sides, over many draws of each."""
    mine = boxes(width, height, scale)
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    rule = v2.RandomResizedCrop(8, scale=scale)
    drawn = [rule.make_params([image]) for _ in range(3000)]
    theirs = np.array([(p["left"], p["top"], p["width"], p["height"]) for p in drawn])
    deviation = np.sqrt((mine.var(axis=0) + theirs.var(axis=0)) / 3000)
    assert (np.abs(mine.mean(axis=0) - theirs.mean(axis=0)) < 4 * deviation + 1e-9).all()


@pytest.mark.parametrize(("width", "height"), [(1000, 20), (20, 1000), (3, 1), (1, 1)])
def test_a_very_long_image_gives_its_middle(width: int, height: int) -> None:
    draws = [0.9, 0.5] * ATTEMPTS + [0.0, 0.0]
    left, top, w, h = random_box(width, height, (0.9, 1.0), (0.75, 4 / 3), draws)
    torch.manual_seed(0)
    rule = v2.RandomResizedCrop(8, scale=(0.99, 1.0))
    theirs = rule.make_params([torch.empty(1, height, width)])
    assert (left, top, w, h) == (theirs["left"], theirs["top"], theirs["width"], theirs["height"])


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_depth_and_channels_show_the_same_crops(channels: int, dtype: type) -> None:
    image = photo(channels=channels)
    deep = {
        np.uint8: image,
        np.uint16: image.astype(np.uint16) * 257,
        np.float32: image.astype(np.float32) / 255,
    }[dtype]
    cfg = small(mean=(0.5,) * channels, std=(0.2,) * channels)
    large, little = crops_of(cfg, deep, generator(0, 0, 0, 0))
    assert large.shape == (2, channels, 32, 32)
    assert little.shape == (3, channels, 16, 16)
    assert large.dtype == little.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    for crops, eight in zip((large, little), crops_of(cfg, image, generator(0, 0, 0, 0)), strict=True):
        level = crops if dtype is np.uint8 else crops * 255
        assert (level.float() - eight.float()).abs().max() < 3
        assert level.float().std() > 5


def test_deep_images_stay_in_zero_to_one_where_bicubic_overshoots() -> None:
    checks = (np.indices((40, 40)).sum(axis=0) // 5 % 2).astype(np.float32)[..., None].repeat(3, axis=2)
    crops, _ = crops_of(small(), checks, generator(0, 0, 0, 0))
    assert crops.min() == 0
    assert crops.max() == 1


def test_pictures_of_pillow_and_read_only_arrays_are_taken() -> None:
    image = photo()
    image.setflags(write=False)
    one = crops_of(small(), Image.fromarray(image), generator(0, 0, 0, 0))
    other = crops_of(small(), image, generator(0, 0, 0, 0))
    assert torch.equal(one[0], other[0])
    gray = Image.fromarray(image).convert("L")
    assert crops_of(small(mean=(0.5,), std=(0.2,)), gray, generator(0, 0, 0, 0))[0].shape == (2, 1, 32, 32)


def test_crops_depend_on_their_generator_alone_and_differ() -> None:
    first, again, other = (crops_of(small(), photo(), generator(0, 0, place, 0)) for place in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])


@pytest.mark.parametrize("key", ["flip", "vertical_flip"])
def test_images_are_mirrored_as_often_as_asked(key: str) -> None:
    """A ramp across the image says which way round a crop is."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    ramp = ramp.swapaxes(0, 1) if key == "flip" else ramp
    cfg = small(**{"flip": 0.0, key: 0.3}, globals=CropGroup(count=1000, size=8))
    crops, _ = crops_of(cfg, np.ascontiguousarray(ramp), generator(0, 0, 0, 0))
    ends = crops.float().mean(dim=2 if key == "flip" else 3)[:, 0]  # (1000, 8)
    mirrored = (ends[:, 0] > ends[:, -1]).float().mean().item()
    assert mirrored == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 1000))


def test_no_local_crops_are_an_empty_tensor() -> None:
    _, none = crops_of(small(locals=CropGroup(count=0, size=16)), photo(), generator(0, 0, 0, 0))
    assert none.shape == (0, 3, 16, 16)


def test_an_image_of_other_channels_is_refused_with_the_keys() -> None:
    with pytest.raises(ValueError, match=r"4 channels, crops\.mean and crops\.std have 3"):
        crops_of(small(), photo(channels=4), generator(0, 0, 0, 0))


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)]
)
def test_an_array_that_is_no_image_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, C\)"):
        to_tensor(array)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 90), (64, 64), (31, 200)])
def test_a_centre_crop_equals_pillows_resize_and_torchvisions_crop(height: int, width: int) -> None:
    image = Image.fromarray(photo(height, width))
    theirs = v2.CenterCrop(48)(v2.Resize(64, interpolation=v2.InterpolationMode.BICUBIC)(image))
    mine = center_crop(image, 64, 48)
    assert mine.shape == (3, 48, 48)
    assert mine.dtype == torch.uint8
    apart = np.abs(mine.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
    assert apart.max() <= 2
    assert (apart <= 1).mean() > 0.99


def test_a_centre_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resize=32 .* size=48"):
        center_crop(photo(), 32, 48)
