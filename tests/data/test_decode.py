"""decode() against files written here by hand, byte by byte, and against the colours that went into them."""

import io
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from PIL import Image

from dinokit.data.decode import SUFFIXES, decode, suffix

PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # the PNG standard's number for so many channels
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def noise(channels: int, dtype: type = np.uint16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (13, 11, channels), dtype, endpoint=True)


def paeth(a: int, b: int, c: int) -> int:
    return min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]


def filtered(rows: np.ndarray) -> Iterator[bytes]:
    """Rows (h, w, c) of 16 bits as PNG filters them, the five kinds in turn."""
    wide = 2 * rows.shape[2]
    above = bytes(rows.shape[1] * wide)
    for number, row in enumerate(rows):
        here, kind = row.astype(">u2").tobytes(), number % 5
        left, corner = bytes(wide) + here, bytes(wide) + above
        guess = [
            (0, left[i], above[i], (left[i] + above[i]) // 2, paeth(left[i], above[i], corner[i]))[kind]
            for i in range(len(here))
        ]
        yield bytes([kind]) + bytes((x - g) % 256 for x, g in zip(here, guess, strict=True))
        above = here


def png(pixels: np.ndarray, interlaced: bool = False, size: tuple[int, int] | None = None) -> bytes:
    """A 16-bit PNG of (h, w, c), which may claim another (width, height)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 16, PNG_COLOUR[channels], 0, 0, interlaced)
    parts = [pixels[y::down, x::right] for x, y, right, down in ADAM7] if interlaced else [pixels]
    data = zlib.compress(b"".join(b"".join(filtered(part)) for part in parts if part.size))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, photometric: int = 1, planar: bool = False) -> bytes:
    """An uncompressed TIFF of (h, w, c), little-endian; photometric 1 is grey, 2 is RGB."""
    height, width, channels = pixels.shape
    strips = [pixels[..., i] for i in range(channels)] if planar else [pixels]
    body = b"".join(strip.astype(pixels.dtype.newbyteorder("<")).tobytes() for strip in strips)
    extra = channels - (3 if photometric == 2 else 1)
    size, many = len(body) // len(strips), len(strips)
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [8 * pixels.itemsize] * channels), (259, 3, [1])]
    tags += [(262, 3, [photometric]), (273, 4, [8 + size * i for i in range(many)]), (277, 3, [channels])]
    tags += [(278, 4, [height]), (279, 4, [size] * many), (284, 3, [1 + planar]), (338, 3, [0] * extra)]
    tags = [tag for tag in tags if tag[2]]
    place = 8 + len(body)
    entries, behind = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'IH'[kind == 3]}", *values)
        if len(packed) > 4:
            start = place + 2 + 12 * len(tags) + 4 + len(behind)
            behind += packed
            packed = struct.pack("<I", start)
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", place)
    return head + body + struct.pack("<H", len(tags)) + entries + bytes(4) + behind


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(("channels", "interlaced"), list(product((1, 2, 3, 4), (False, True))))
def test_every_number_of_a_16_bit_png_comes_back(channels: int, interlaced: bool) -> None:
    pixels = noise(channels)
    found = decode(png(pixels, interlaced), "x.png", channels)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, pixels)


def test_16_bit_colour_becomes_grey_by_the_weights_of_the_television_standard() -> None:
    pixels = noise(4)
    by_hand = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in row] for row in pixels.tolist()]
    grey = np.asarray(decode(png(pixels), "x.png", 1))
    assert grey.dtype == np.uint16
    np.testing.assert_allclose(grey[..., 0], by_hand, atol=2)


def test_16_bit_grey_becomes_three_equal_channels_and_alpha_is_dropped() -> None:
    pixels = noise(2)
    colour = decode(png(pixels), "x.png", 3)
    np.testing.assert_array_equal(colour, np.stack([pixels[..., 0]] * 3, -1))
    np.testing.assert_array_equal(decode(png(noise(4)), "x.png", 3), noise(4)[..., :3])


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
        (png(noise(3)), 3, 4),
    ],
)
def test_a_wrong_number_of_channels_is_named_with_the_key_to_change(
    data: bytes, has: int, wants: int
) -> None:
    with pytest.raises(ValueError, match=rf"has {has} channels.*backbone.channels is {wants}"):
        decode(data, "x", wants)


def test_a_grey_tiff_keeps_its_16_bits_without_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    found = np.asarray(decode(tiff(noise(1)), "x.tif", 1))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, noise(1))


def test_a_tiff_that_pillow_would_cut_down_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for data, channels in (
        (tiff(noise(3), photometric=2), 3),
        (tiff(noise(5)), 5),
        (tiff(noise(6, np.uint8), 2), 6),
    ):
        with pytest.raises(ValueError, match=r"^x.tif.*dinokit\[tiff\]"):
            decode(data, "x.tif", channels)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(("channels", "photometric"), [(3, 2), (5, 1), (6, 2), (2, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_number_of_a_tiff_of_many_bands_comes_back(
    dtype: type, channels: int, photometric: int, planar: bool
) -> None:
    pytest.importorskip("tifffile")
    pixels = noise(channels, dtype)
    np.testing.assert_array_equal(
        np.asarray(decode(tiff(pixels, photometric, planar), "x.tif", channels)), pixels
    )


def test_bands_beyond_rgb_are_not_dropped_in_silence() -> None:
    pytest.importorskip("tifffile")
    with pytest.raises(ValueError, match=r"has 6 channels.*backbone.channels is 3"):
        decode(tiff(noise(6, np.uint8), photometric=2), "x.tif", 3)


def intact() -> dict[str, bytes]:
    pixels = noise(3, np.uint8)
    image = Image.fromarray(pixels)
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
    deep = {f"deep {c}": png(noise(c)) for c in PNG_COLOUR}
    return {kind: saved(image, kind) for kind in kinds} | {"npy": npy(pixels)} | deep


@pytest.mark.parametrize("kind", intact())
def test_a_file_that_is_cut_short_is_refused_by_name(kind: str) -> None:
    data = intact()[kind]
    channels = int(kind[-1]) if kind.startswith("deep") else 3
    decode(data, "whole", channels)
    for share in (0, 0.1, 0.5, 0.8):
        with pytest.raises(ValueError, match=r"^some/where\.x cannot be read"):
            decode(data[: int(share * len(data))], "some/where.x", channels)


@pytest.mark.parametrize("kind", intact())
def test_whatever_is_wrong_with_a_file_it_is_a_value_error(kind: str) -> None:
    data, rng, said = intact()[kind], random.Random(0), []
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode(bytes(damaged), "x", 3)
        except ValueError as error:
            said.append(str(error))
    assert said
    assert all(text.startswith("x cannot be read") for text in said)


def test_a_small_file_that_claims_to_be_huge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^bomb.png cannot be read.*pixels"):
        decode(png(noise(3), size=(100_000, 100_000)), "bomb.png", 3)


def test_a_text_file_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"^x.jpg cannot be read"):
        decode(b"<html>404</html>", "x.jpg", 3)


def test_suffixes_are_those_of_images_in_any_case() -> None:
    assert all(suffix(name) in SUFFIXES for name in ("a.JPG", "a.b/c.d.jpeg", "x.Tiff"))
    assert not any(
        suffix(name) in SUFFIXES for name in ("jpg", ".jpg", "a/.png", "a.jpg/readme", "a.json", "")
    )
