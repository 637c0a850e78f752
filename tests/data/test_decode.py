"""decode() against the colours and numbers that went into a file."""

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from dinokit.data.decode import SUFFIXES, decode, suffix


def noise(channels: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (13, 11, channels), dtype, endpoint=True)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def eight_bit_files() -> Iterator[tuple[str, bytes]]:
    """One orange, in every way to store it."""
    orange = Image.new("RGB", (8, 6), (240, 120, 40))
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000"):
        yield kind, saved(orange, kind)
    for mode in ("CMYK", "YCbCr"):
        yield f"JPEG of {mode}", saved(orange.convert(mode), "JPEG", quality=95)
    half = orange.copy()
    half.putalpha(128)
    yield "alpha", saved(half, "PNG")
    yield "palette", saved(orange.quantize(4), "PNG")
    yield "palette with alpha", saved(half.quantize(4), "PNG")
    yield "CMYK TIFF", saved(orange.convert("CMYK"), "TIFF")
    turned = Image.Exif()
    turned[274] = 6
    yield "EXIF", saved(orange, "JPEG", exif=turned, quality=95)


@pytest.mark.parametrize(
    ("kind", "data"), list(eight_bit_files()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_an_orange_is_orange_however_it_is_stored(kind: str, data: bytes) -> None:
    colour, grey = decode(data, kind, 3), decode(data, kind, 1)
    assert isinstance(colour, Image.Image)
    assert isinstance(grey, Image.Image)
    assert (colour.mode, grey.mode, colour.size) == ("RGB", "L", (8, 6))  # EXIF's quarter turn is not made
    np.testing.assert_allclose(np.asarray(colour).mean((0, 1)), (240, 120, 40), atol=6)
    assert np.asarray(grey).mean() == pytest.approx(0.299 * 240 + 0.587 * 120 + 0.114 * 40, abs=4)


def test_black_and_white_and_grey_with_alpha_become_rgb() -> None:
    white = Image.new("1", (3, 2), 1)
    assert np.asarray(decode(saved(white, "PNG"), "x.png", 3)).min() == 255
    grey = Image.new("LA", (3, 2), (77, 5))
    assert np.unique(np.asarray(decode(saved(grey, "PNG"), "x.png", 3))).tolist() == [77]


def test_four_stored_channels_are_given_as_they_are() -> None:
    pixels = noise(4, np.uint8)
    found = decode(saved(Image.fromarray(pixels, "RGBA"), "PNG"), "x.png", 4)
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_array_of_many_bands_comes_back(dtype: type, order: str) -> None:
    pixels = noise(7, dtype)
    found = np.asarray(decode(npy(pixels.astype(np.dtype(dtype).newbyteorder(order))), "x.npy", 7))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels)


def test_a_flat_array_has_one_channel_and_floats_become_float32() -> None:
    found = np.asarray(decode(npy(np.linspace(0, 1, 12).reshape(3, 4)), "x.npy", 1))
    assert (found.shape, found.dtype) == ((3, 4, 1), np.float32)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((2, 2, 5), 2.0), "2"),
        (np.full((2, 2, 5), np.nan), "nan"),
        (np.zeros((2, 2, 5), np.int32), "int32"),
        (np.zeros((2, 2, 2, 5), np.uint8), "2, 2, 2, 5"),
        (np.zeros((0, 2, 5), np.uint8), "0, 2, 5"),
        (np.array([{}]), "pickle"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^x.npy cannot be read.*{says}"):
        decode(npy(array), "x.npy", 5)


@pytest.mark.parametrize(
    ("data", "has", "wants"),
    [
        (npy(noise(5)), 5, 3),
        (npy(noise(3)), 3, 1),
        (saved(Image.new("RGB", (4, 4)), "PNG"), 3, 4),
    ],
)
def test_a_wrong_number_of_channels_is_named_with_the_key_to_change(
    data: bytes, has: int, wants: int
) -> None:
    with pytest.raises(ValueError, match=rf"has {has} channels.*backbone.channels is {wants}"):
        decode(data, "x", wants)


def intact() -> dict[str, bytes]:
    pixels = noise(3, np.uint8)
    image = Image.fromarray(pixels)
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
    return {kind: saved(image, kind) for kind in kinds} | {"npy": npy(pixels)}


@pytest.mark.parametrize("kind", intact())
def test_a_file_that_is_cut_short_is_refused_by_name(kind: str) -> None:
    data = intact()[kind]
    decode(data, "whole", 3)
    for share in (0, 0.1, 0.5, 0.8):
        with pytest.raises(ValueError, match=r"^some/where\.x cannot be read"):
            decode(data[: int(share * len(data))], "some/where.x", 3)


@pytest.mark.parametrize("kind", intact())
def test_whatever_is_wrong_with_a_file_it_is_a_value_error(kind: str) -> None:
    data, rng, messages = intact()[kind], random.Random(0), []
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode(bytes(damaged), "x", 3)
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(text.startswith("x cannot be read") for text in messages)


def test_a_text_file_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"^x.jpg cannot be read"):
        decode(b"<html>404</html>", "x.jpg", 3)


def test_suffixes_are_those_of_images_in_any_case() -> None:
    assert all(suffix(name) in SUFFIXES for name in ("a.JPG", "a.b/c.d.jpeg", "x.Tiff"))
    assert not any(
        suffix(name) in SUFFIXES for name in ("jpg", ".jpg", "a/.png", "a.jpg/readme", "a.json", "")
    )
