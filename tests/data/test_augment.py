"""Photometric against torchvision's functions, equal to one grey level, and draw() by counting."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from dinokit.config.load import CropGroup, Crops
from dinokit.data import augment as ph
from dinokit.data.sampler import generator

GREY_LEVEL = 1 / 255
NEUTRAL = [1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0]
# So that what comes out is the image itself; and every operation may have been drawn.
RAW = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "globals": CropGroup(solarize=(0.5,))}
STRENGTH = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def photo_like(batch: int, size: int = 48, seed: int = 0) -> Tensor:
    """Smooth colours with fine noise, some of it black, white and grey. (batch, 3, size, size) uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=g) * 1.4 - 0.2
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    fine = fine + 0.1 * torch.randn(batch, 3, size, size, generator=g)
    fine[:, :, :4, :4] = fine[:, :1, :4, :4]
    return (fine.clamp(0, 1) * 255).byte()


def row(**changes: float) -> list[float]:
    """Parameters that do nothing but `changes`: a jitter by its name, or gray, sigma, solarize."""
    result = list(NEUTRAL)
    first = ph.ORDER
    for key, value in changes.items():
        column = getattr(ph, key.upper())
        result[column] = value
        if column < 4:
            result[first], first = column, first + 1
    return result


def params_of(cfg: Crops, crops: int) -> Tensor:
    """Parameters of so many global crops of as many images. (crops, COLUMNS)"""
    rows = [ph.draw(cfg, cfg.globals, 0, generator(0, 0, i, 0)) for i in range(crops)]
    return torch.from_numpy(np.stack(rows))


def by_torchvision(
    image: Tensor, params: list[float], kernel: int = 9, threshold: float = 128 / 255
) -> Tensor:
    """One crop (3, S, S) in [0, 1], through the library's own functions."""
    jitter = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue
    for op in params[ph.ORDER : ph.ORDER + 4]:
        if op >= 0:
            image = jitter[int(op)](image, params[int(op)])
    if params[ph.GRAY]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if params[ph.SIGMA]:
        image = tv.gaussian_blur(image, [kernel, kernel], [params[ph.SIGMA]] * 2)
    return tv.solarize(image, threshold) if params[ph.SOLARIZE] else image


@pytest.mark.parametrize(
    "params",
    [
        row(),
        *[row(brightness=f) for f in (0.0, 0.6, 1.4)],
        *[row(contrast=f) for f in (0.0, 0.6, 1.4)],
        *[row(saturation=f) for f in (0.0, 0.8, 1.2)],
        *[row(hue=f) for f in (-0.5, -0.3, -0.1, 0.07, 0.1, 0.4, 0.5)],
        row(gray=1),
        *[row(sigma=s) for s in (0.1, 0.5, 1.0, 2.0)],
        row(solarize=1),
    ],
)
def test_each_operation_equals_torchvision(params: list[float]) -> None:
    crops = photo_like(3)
    result = ph.Photometric(Crops(**RAW))(crops, torch.tensor([params] * 3))
    for image, mine in zip(crops, result, strict=True):
        assert (mine - by_torchvision(image / 255, params)).abs().max() < GREY_LEVEL / 2


def test_many_crops_at_once_equal_torchvision_one_at_a_time() -> None:
    cfg = Crops(**RAW | {"globals": CropGroup(blur=(0.5,), solarize=(0.3,))}, jitter=0.9)
    params, crops = params_of(cfg, 40), photo_like(40)
    result = ph.Photometric(cfg)(crops, params)
    apart = 0
    for image, mine, numbers in zip(crops, result, params.tolist(), strict=True):
        off = (mine - by_torchvision(image / 255, numbers)).abs() > GREY_LEVEL
        apart += off.sum().item()  # solarise jumps: a rounding on the threshold shows as a whole step
    assert apart < 5
    assert len({tuple(numbers[4:8]) for numbers in params.tolist()}) > 15


def test_normalised_crops_have_the_channel_means_and_deviations_taken_out() -> None:
    cfg = Crops()
    crops = photo_like(2)
    result = ph.Photometric(cfg)(crops, torch.tensor([NEUTRAL] * 2))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, tv.normalize(crops / 255, list(cfg.mean), list(cfg.std)))


def test_float_crops_are_taken_as_they_are_and_left_as_they_were() -> None:
    crops = photo_like(2)
    floats = crops / 255
    params = torch.tensor([row(contrast=1.3, hue=0.1, sigma=1.0)] * 2)
    colour = ph.Photometric(Crops(**RAW))
    torch.testing.assert_close(colour(floats, params), colour(crops, params))
    assert torch.equal(floats, crops / 255)


@pytest.mark.parametrize(
    ("stance", "changes"),
    [
        pytest.param("force_eager", {}, id="as written"),
        pytest.param("default", {}, id="compiled", marks=pytest.mark.slow),
        pytest.param(
            "force_eager",
            {"saturation": 0.0, "globals": CropGroup(blur=(0.0,), solarize=(0.0,))},
            id="some operations",
        ),
        pytest.param(
            "force_eager",
            {"blur_kernel": 65, "globals": CropGroup(size=48, blur=(1.0,))},
            id="too small to blur",
        ),
        pytest.param(
            "force_eager",
            {"hue": 0.0, "saturation": 0.0, "gray": 0.0, "mean": (0.4,), "std": (0.2,)},
            id="one channel",
        ),
    ],
)
def test_every_operation_on_every_crop_gives_what_those_that_were_drawn_give(
    stance: str, changes: dict[str, Any]
) -> None:
    cfg = Crops(**{"globals": CropGroup(blur=(0.5,), solarize=(0.3,)), **changes})
    crops = photo_like(30, 32)[:, : len(cfg.mean)]
    params = params_of(cfg, 30)
    everywhere = ph.Photometric(cfg, compiled=True)
    with torch.compiler.set_stance(stance):
        for images in (crops, crops / 255):
            there = ph.Photometric(cfg)(images, params)
            torch.testing.assert_close(everywhere(images, params), there, atol=2e-5, rtol=1e-5)


def test_a_crop_is_coloured_alike_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Crops()
    crops = photo_like(12, 32)
    params = params_of(cfg, 12)
    together = ph.Photometric(cfg)(crops, params)
    monkeypatch.setattr(ph, "TILE", 1)
    alone = ph.Photometric(cfg)(crops, params)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_device_is_never_asked_for_a_value(compiled: bool) -> None:
    """A tensor on the device "meta" has no values: asking for one raises; on a GPU it would wait."""
    cfg = Crops(globals=CropGroup(blur=(0.5,), solarize=(0.5,)))
    with torch.compiler.set_stance("force_eager"):
        result = ph.Photometric(cfg, compiled)(photo_like(20).to("meta"), params_of(cfg, 20))
    assert result.device.type == "meta"
    assert result.shape == (20, 3, 48, 48)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_what_the_cpu_gives_without_being_waited_for(compiled: bool) -> None:
    cfg = Crops(globals=CropGroup(blur=(0.5,), solarize=(0.0,)))
    params, crops = params_of(cfg, 20), photo_like(20)
    there, colour = crops.cuda(), ph.Photometric(cfg, compiled)
    colour(there, params)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = colour(there, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), ph.Photometric(cfg)(crops, params), atol=1e-4, rtol=1e-4)


def test_no_crops_are_no_work() -> None:
    assert (
        ph.Photometric(Crops())(torch.zeros(0, 3, 96, 96, dtype=torch.uint8), torch.zeros(0, 11)).shape[0]
        == 0
    )


def test_grey_pixels_keep_their_colour_under_a_turn_of_hue() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    result = ph.Photometric(Crops(**RAW))(ramp, torch.tensor([row(hue=0.37)]))
    torch.testing.assert_close(result, ramp / 255, atol=1e-6, rtol=0)


def test_six_channels_are_blurred_and_blended_with_the_mean_over_all_of_them() -> None:
    plain = {"hue": 0.0, "saturation": 0.0, "gray": 0.0, "mean": (0.0,) * 6, "std": (1.0,) * 6}
    crops = torch.rand(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    result = ph.Photometric(Crops(**plain))(crops, torch.tensor([row(contrast=0.5), row(sigma=1.5)]))
    torch.testing.assert_close(result[0], 0.5 * crops[0] + 0.5 * crops[0].mean())
    torch.testing.assert_close(result[1], tv.gaussian_blur(crops[1], [9, 9], [1.5, 1.5]), atol=1e-5, rtol=0)


def test_colours_of_one_channel_are_refused_with_the_keys_to_change() -> None:
    with pytest.raises(ValueError, match=r"crops\.hue=0 crops\.saturation=0 crops\.gray=0"):
        ph.Photometric(Crops(mean=(0.5,), std=(0.2,)))
    with pytest.raises(ValueError, match=r"Set crops\.gray=0\."):
        ph.Photometric(Crops(mean=(0.5,), std=(0.2,), hue=0, saturation=0))


def test_a_kernel_wider_than_the_mirror_of_a_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"crops\.blur_kernel=33 .* crops\.locals\.size=16"):
        ph.Photometric(Crops(blur_kernel=33, locals=CropGroup(size=16)))


def drawn(cfg: Crops, group: CropGroup, crop: int = 0, count: int = 4000) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(0))
    return np.stack([ph.draw(cfg, group, crop, rng) for _ in range(count)])


def near(share: float, probability: float, count: int = 4000) -> bool:
    return abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / count) + 1e-9


def test_each_operation_comes_as_often_as_asked() -> None:
    group = CropGroup(count=2, blur=(0.1, 0.9), solarize=(0.0, 0.2))
    for crop, (blur, solarize) in enumerate([(0.1, 0.0), (0.9, 0.2)]):
        rows = drawn(Crops(), group, crop)
        assert near((rows[:, ph.ORDER] >= 0).mean(), 0.8)
        assert near((rows[:, ph.GRAY] > 0).mean(), 0.2)
        assert near((rows[:, ph.SIGMA] > 0).mean(), blur)
        assert near((rows[:, ph.SOLARIZE] > 0).mean(), solarize)
    assert near((drawn(Crops(), CropGroup(count=8, blur=(0.5,)), 7)[:, ph.SIGMA] > 0).mean(), 0.5)


def test_jitter_factors_fill_their_ranges_and_every_order_comes() -> None:
    rows = drawn(Crops(jitter=1.0, brightness=1.5), CropGroup())
    for column, (low, high) in enumerate([(0.0, 2.5), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = rows[:, column]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    orders, counts = np.unique(rows[:, 4:8], axis=0, return_counts=True)
    assert len(orders) == 24
    assert (
        (counts - 4000 / 24) ** 2 / (4000 / 24)
    ).sum() < 50  # chi-square, 23 degrees: 0.1 % lie above 49.7
    sigma = drawn(Crops(blur_sigma=(0.1, 2.0)), CropGroup(blur=(1.0,)))[:, ph.SIGMA]
    assert sigma.min() >= 0.1
    assert sigma.mean() == pytest.approx(1.05, abs=0.04)


def test_an_operation_of_strength_zero_is_never_run() -> None:
    rows = drawn(Crops(jitter=1.0, contrast=0.0, hue=0.0), CropGroup(), count=200)
    assert {tuple(sorted(order)) for order in rows[:, 4:8].tolist()} == {(-1, -1, 0, 2)}


def test_changing_one_probability_leaves_the_other_draws_alone() -> None:
    some, none = (
        drawn(Crops(), CropGroup(), count=50),
        drawn(Crops(gray=0.0, jitter=0.0), CropGroup(), count=50),
    )
    np.testing.assert_array_equal(some[:, ph.SIGMA], none[:, ph.SIGMA])


def test_a_tint_multiplies_each_channel_by_a_factor_of_its_own() -> None:
    factors = drawn(Crops(tint=0.3), CropGroup())[:, ph.TINT :]
    assert (factors.min(), factors.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.3, abs=0.01))
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.1  # each channel alone
    cfg = Crops(jitter=0.0, gray=0.0, tint=0.3, mean=(0.0,) * 3, std=(1.0,) * 3)
    cfg.globals.blur = (0.0,)
    params, crops = params_of(cfg, 6), torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (crops * params[:, ph.TINT :, None, None]).clamp(0, 1)
    torch.testing.assert_close(ph.Photometric(cfg)(crops, params), expected)
    torch.testing.assert_close(ph.Photometric(cfg)._apply_everywhere(crops, params), expected)
