"""decode() of more than 8 bits or 4 channels, against PNG and TIFF files written here byte by byte."""

import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from dinokit.data.decode import decode

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
    passes = [pixels[y::down, x::right] for x, y, right, down in ADAM7] if interlaced else [pixels]
    data = zlib.compress(b"".join(b"".join(filtered(rows)) for rows in passes if rows.size))
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
        with pytest.raises(ValueError, match=r"^x.tif.*\.\[tiff\]"):
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


def test_a_small_file_that_claims_to_be_huge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^bomb.png cannot be read.*pixels"):
        decode(png(noise(3), size=(100_000, 100_000)), "bomb.png", 3)


def test_a_wrong_number_of_deep_channels_is_named_with_the_key_to_change() -> None:
    with pytest.raises(ValueError, match=r"has 3 channels.*backbone.channels is 4"):
        decode(png(noise(3)), "x.png", 4)


@pytest.mark.parametrize("channels", PNG_COLOUR)
def test_a_damaged_16_bit_png_is_refused_by_name(channels: int) -> None:
    data = png(noise(channels))
    for size in (0, 30, len(data) // 2, len(data) - 40):
        with pytest.raises(ValueError, match=r"^where/x\.png cannot be read"):
            decode(data[:size], "where/x.png", channels)
    for place in range(41, len(data) - 16, 50):  # among the compressed pixels
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        with pytest.raises(ValueError, match=r"^where/x\.png cannot be read"):
            decode(bytes(damaged), "where/x.png", channels)
