"""JPEGs decoded at reduced size: the same crops as from full size, within the errors stated here."""

import io
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config.load import CropGroup, Crops, load_recipe
from dinokit.data.batch import Batch
from dinokit.data.decode import decode, jpeg_size
from dinokit.data.loader import training_loader
from dinokit.data.sampler import generator
from dinokit.data.sources import ImageLike, folder, scenes
from dinokit.data.transforms import (
    LEAST_RESIZE,
    Box,
    CropBoxes,
    MultiCrop,
    decode_reduced,
    largest_reduction,
    reduce_boxes,
    size_of,
)
from dinokit.train.run_dir import differences

MULTI_CROP = MultiCrop(Crops())  # 2 x 224 and 8 x 96, as DINO and DINOv2 have them


def smooth(width: int, height: int) -> np.ndarray:
    """Waves, five across the image: a crop that lies elsewhere shows something else."""
    x = np.linspace(0, 10 * np.pi, width, dtype=np.float32)
    y = np.linspace(0, 8 * np.pi, height, dtype=np.float32)[:, None]
    waves = [np.sin(x) + np.cos(y), np.cos(x + y / 2), np.sin(x / 3) - np.sin(y / 2)]
    return np.stack([128 + 50 * wave for wave in waves], axis=2).astype(np.uint8)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def saved(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **{"quality": 92, **options})
    return file.getvalue()


def whole(data: bytes, multi_crop: MultiCrop, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = decode(data, "x", len(multi_crop.cfg.mean))
    return multi_crop(image, multi_crop.draw(*size_of(image), generator(0, 0, place, 0)))


def read(data: bytes, multi_crop: MultiCrop, place: int) -> tuple[ImageLike, CropBoxes]:
    return decode_reduced(data, "x", multi_crop, generator(0, 0, place, 0))


def drawn(size: tuple[int, int], place: int) -> CropBoxes:
    return MULTI_CROP.draw(*size, generator(0, 0, place, 0))


def apart(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> np.ndarray:
    pairs = zip(one, other, strict=True)
    return torch.cat([(a.float() - b.float()).abs().flatten() for a, b in pairs]).numpy()


LARGE = pytest.mark.parametrize(
    ("size", "factor"), [((2000, 1500), 2), ((1999, 1501), 2), ((4000, 3000), 4), ((4003, 3005), 4)]
)


def at(size: tuple[int, int], factor: int) -> int:
    """A place whose crops let an image of that size be reduced by that factor."""
    return next(p for p in range(20) if largest_reduction(drawn(size, p), MULTI_CROP.cfg) == factor)


def by_pillow(data: bytes, boxes: CropBoxes, factor: int, multi_crop: MultiCrop) -> tuple[torch.Tensor, ...]:
    """Crops that Pillow cuts from the full image; `boxes` are in an image reduced by a factor."""
    image = decode(data, "x", len(multi_crop.cfg.mean))
    assert isinstance(image, Image.Image)
    groups = zip((multi_crop.cfg.globals.size, multi_crop.cfg.locals.size), boxes, strict=True)
    return tuple(
        torch.stack([_by_pillow(image, box, factor, size) for box in drawn]) for size, drawn in groups
    )


def _by_pillow(image: Image.Image, box: Box, factor: int, size: int) -> torch.Tensor:
    right, bottom = min((box.left + box.width) * factor, image.width), (box.top + box.height) * factor
    edges = box.left * factor, box.top * factor, right, min(bottom, image.height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, edges))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).flip(box.flips)


@LARGE
@pytest.mark.parametrize(
    ("pattern", "resampled", "shifted"), [(smooth, (0.3, 2), (0.6, 4)), (noise, (1.5, 10), (2.5, 18))]
)
def test_crops_are_those_of_a_whole_decoding(pattern, resampled, shifted, size, factor) -> None:
    """Errors in grey levels of 255, the mean, and what one number in a thousand may exceed.

    `resampled`: against what Pillow cuts from the whole image at the very same place. `shifted`: against the
    crops of the whole image, from whose boxes these are up to half a pixel away.
    """
    data, place = saved(pattern(*size)), at(size, factor)
    image, boxes = read(data, MULTI_CROP, place)
    assert size_of(image) == tuple(-(-side // factor) for side in size)
    for theirs, (mean, most) in (
        (by_pillow(data, boxes, factor, MULTI_CROP), resampled),
        (whole(data, MULTI_CROP, place), shifted),
    ):
        errors = apart(MULTI_CROP(image, boxes), theirs)
        assert errors.mean() < mean
        assert np.percentile(errors, 99.9) <= most


@pytest.mark.parametrize(
    ("size", "among"),
    [((2000, 1500), {1, 2}), ((2001, 1503), {1, 2}), ((4000, 300), {1}), ((6007, 8011), {4, 8})],
)
def test_boxes_move_by_half_a_pixel_at_most_and_stay_in_an_image_that_is_as_small_as_they_allow(
    size: tuple[int, int], among: set[int]
) -> None:
    """Over many draws: each edge within half a pixel of its place, each crop reduced by LEAST_RESIZE."""
    factors = set()
    for place in range(200):
        boxes = drawn(size, place)
        factor = largest_reduction(boxes, MULTI_CROP.cfg)
        factors.add(factor)
        shrink = [min(b.width, b.height) / 224 for b in boxes.globals]
        shrink += [min(b.width, b.height) / 96 for b in boxes.locals]
        assert factor == 1 or min(shrink) >= LEAST_RESIZE * factor
        assert factor == 8 or min(shrink) < LEAST_RESIZE * factor * 2
        for before, after in zip(chain(*boxes), chain(*reduce_boxes(boxes, factor)), strict=True):
            assert abs(after.left - before.left / factor) <= 0.5
            assert abs(after.top - before.top / factor) <= 0.5
            assert abs(after.left + after.width - (before.left + before.width) / factor) <= 0.5
            assert abs(after.top + after.height - (before.top + before.height) / factor) <= 0.5
            assert after.left >= 0
            assert after.top >= 0
            assert after.left + after.width <= -(-size[0] // factor)
            assert after.top + after.height <= -(-size[1] // factor)
            assert after.flips == before.flips
    assert factors == among


@pytest.mark.parametrize("pattern", [smooth, noise])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 481), (64, 64), (3, 2)])
def test_an_image_that_is_not_large_enough_is_decoded_whole_to_the_bit(
    pattern, size: tuple[int, int]
) -> None:
    data = saved(pattern(*size))
    for place in range(5):
        image, boxes = read(data, MULTI_CROP, place)
        assert size_of(image) == size
        assert apart(MULTI_CROP(image, boxes), whole(data, MULTI_CROP, place)).max() == 0


def test_as_many_random_numbers_are_drawn_as_for_a_whole_decoding() -> None:
    one, other = generator(0, 0, 0, 0), generator(0, 0, 0, 0)
    decode_reduced(saved(smooth(2000, 1500)), "x", MULTI_CROP, one)
    MULTI_CROP.draw(500, 375, other)
    assert one.random() == other.random()


# As phones write a photo with its depth map or gain map.
FRAMES = {"kind": "MPO", "save_all": True, "append_images": [Image.new("RGB", (8, 6))]}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


SMALL = MultiCrop(
    Crops(globals=CropGroup(size=32), locals=CropGroup(count=3, size=16, scale=(0.05, 0.32)))
)  # shrinks 403 x 301 pixels


@pytest.mark.parametrize(
    "options",
    [{"exif": turned()}, {"progressive": True}, {"subsampling": 0}, FRAMES],
    ids=["turned", "progressive", "whole colour", "frames"],
)
def test_a_jpeg_of_any_kind_is_reduced_and_upright(options: dict[str, Any]) -> None:
    # A turn moves the half pixel of an odd side to its other end.
    data = saved(smooth(404, 302) if "exif" in options else smooth(403, 301), **options)
    image, boxes = read(data, SMALL, 0)
    assert size_of(image) == ((151, 202) if "exif" in options else (202, 151))
    assert apart(SMALL(image, boxes), by_pillow(data, boxes, 2, SMALL)).mean() < 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_of_other_channels_is_reduced_to_the_same_colours(mode: str, channels: int) -> None:
    file = io.BytesIO()
    Image.fromarray(smooth(403, 301)).convert(mode).save(file, "JPEG", quality=95)
    multi_crop = MultiCrop(replace(SMALL.cfg, mean=(0.5,) * channels, std=(0.2,) * channels))
    image, boxes = read(file.getvalue(), multi_crop, 0)
    assert size_of(image) == (202, 151)
    assert apart(multi_crop(image, boxes), by_pillow(file.getvalue(), boxes, 2, multi_crop)).mean() < 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_files_of_other_kinds_are_whole(kind: str) -> None:
    data = saved(smooth(403, 301), kind)
    image, boxes = read(data, SMALL, 0)
    assert size_of(image) == (403, 301)
    assert apart(SMALL(image, boxes), whole(data, SMALL, 0)).max() == 0


@pytest.mark.parametrize("size", [2, 100, 5000])
def test_a_file_that_is_cut_short_is_named(size: int) -> None:
    with pytest.raises(ValueError, match=r"^x cannot be read"):
        read(saved(noise(403, 301))[:size], SMALL, 0)


def test_no_size_is_read_from_a_file_that_is_no_jpeg() -> None:
    assert jpeg_size(saved(smooth(30, 20))) == (30, 20)
    assert jpeg_size(saved(smooth(30, 20), "PNG")) is None
    assert jpeg_size(b"nothing") is None


def test_a_loader_gives_the_same_crops_and_colours_whole_or_reduced(tmp_path: Path) -> None:
    for number, size in enumerate([(403, 301), (301, 403), (60, 50)]):
        (tmp_path / f"{number}.jpg").write_bytes(saved(smooth(*size)))
    Image.fromarray(smooth(403, 301)).save(tmp_path / "3.png")
    source = folder.build(folder.Config(str(tmp_path)))

    def batches(decode: str, workers: int = 0) -> list[Batch]:
        cfg = replace(SMALL.cfg, decode=decode)
        return list(
            training_loader(source, cfg, None, seed=0, start_step=0, steps=2, batch=4, workers=workers)
        )

    first, once_more, other = batches("reduced"), batches("reduced", workers=1), batches("whole")
    for a, b, c in zip(first, once_more, other, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.local_crops, b.local_crops)
        assert torch.equal(a.global_colour, c.global_colour)
        assert torch.equal(a.local_colour, c.local_colour)
        assert 0 < apart((a.global_crops, a.local_crops), (c.global_crops, c.local_crops)).mean() < 3


def test_a_source_without_files_is_refused_with_the_way_out() -> None:
    source, cfg = scenes.build(scenes.Config()), replace(SMALL.cfg, decode="reduced")
    with pytest.raises(ValueError, match=r"source Scenes .* crops\.decode=whole"):
        training_loader(source, cfg, None, seed=0, start_step=0, steps=1, batch=1)


def test_a_run_is_not_gone_on_with_under_another_decoding() -> None:
    one, other = (load_recipe("scenes_cpu", [f"crops.decode={how}"]) for how in ("whole", "reduced"))
    assert differences(one, other) == ["crops.decode was whole, now reduced"]
