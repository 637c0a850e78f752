"""decode() against the colours and numbers that went into a file."""

import io
import os
import random
import resource
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image, ImageOps

from dinokit.config import registry
from dinokit.data.decode import SUFFIXES, as_image, decode, jpeg_size, suffix
from dinokit.data.transforms import center_crop, to_tensor


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
    assert (colour.mode, grey.mode) == ("RGB", "L")
    assert colour.size == ((6, 8) if kind == "EXIF" else (8, 6))  # a quarter turn
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


RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in getrusage's unit


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def npy_header(shape: str, kind: str = "|u1", rest: bytes = bytes(12)) -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + rest


def png_header(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (npy_header("(60000, 60000, 3)"), "do not hold"),
        (npy_header("(-2, -2, 3)"), "."),
        (npy_header("(1000000000000,)", "<f8"), "do not hold"),
        (png_header(60_000, 60_000), "max_pixels"),
        (png_header(1, 2**31 - 1), "max_pixels"),
        (b"P6 40000 40000 255\n", "max_pixels"),
        (b"II*\0" + bytes(60), "."),
    ],
)
def test_a_header_with_absurd_sizes_is_refused_before_anything_is_allocated(data: bytes, why: str) -> None:
    tracemalloc.start()
    before = peak_bytes()
    with pytest.raises(ValueError, match=rf"^big\.x cannot be read: .*{why}"):
        decode(data, "big.x", 3)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert peak_bytes() - before < 10**8


def test_the_limit_of_pixels_can_be_set_and_names_the_file(tmp_path: Path) -> None:
    Image.new("L", (3000, 40)).save(tmp_path / "wide.png")
    section = {"name": "folder", "path": str(tmp_path)}
    with pytest.raises(ValueError, match=r"wide\.png cannot be read: it has 3000 x 40 .*data\.max_pixels"):
        registry.build("data.sources", {**section, "max_pixels": 100_000})[0]
    assert registry.build("data.sources", {**section, "max_pixels": 120_000})[0][0].size == (3000, 40)


@pytest.mark.parametrize("how", ["a FIFO", "a device", "a link to a FIFO"])
def test_what_is_no_file_is_unreadable_and_never_waited_for(tmp_path: Path, how: str) -> None:
    image = tmp_path / "images" / "0.png"
    image.parent.mkdir()
    if how == "a device":
        image.symlink_to("/dev/zero")
    else:
        fifo = image if how == "a FIFO" else tmp_path / "pipe"
        os.mkfifo(fifo)
        if fifo != image:
            image.symlink_to(fifo)
    source = registry.build("data.sources", {"name": "folder", "path": str(image.parent)})
    with pytest.raises(OSError, match=r"0\.png is a (FIFO|device), not a file"):
        source[0]


def test_a_thin_image_is_cut_before_it_is_resized() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60_000, 1, 3), dtype=np.uint8)
    before = peak_bytes()
    cut = center_crop(Image.fromarray(pixels), 256, 224)
    assert peak_bytes() - before < 10**8
    small = Image.fromarray(pixels[:40])  # 40 of one pixel: as thin, small enough to be resized whole
    whole = F.interpolate(to_tensor(small), (40 * 64, 64), mode="bicubic", antialias=True)[0]
    close = center_crop(small, 64, 56).float() - whole[:, 1252:1308, 4:60].float()
    assert cut.shape == (3, 224, 224)
    assert close.abs().max() <= 1


def oriented(kind: str, value: int) -> bytes:
    """An image of eight colours without symmetry, and an EXIF orientation."""
    exif = Image.Exif()
    exif[274] = value
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    options = (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    return saved(Image.fromarray(pixels), kind, exif=exif, **options)


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_upright_as_pillow_turns_it_unless_it_is_wanted_as_stored(kind: str, value: int) -> None:
    data = oriented(kind, value)
    plain = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(plain) if 1 <= value <= 8 else plain)
    assert (np.asarray(decode(data, "x", 3)) == expected).all()
    assert (np.asarray(as_image(decode(data, "x", 3), 3)) == expected).all()  # it is not turned twice
    assert (np.asarray(decode(data, "x", 3, orient="stored")) == np.asarray(plain)).all()
    if kind == "JPEG":
        assert jpeg_size(data) == (expected.shape[1], expected.shape[0])
        assert jpeg_size(data, "stored") == plain.size
        reduced = np.asarray(decode(data, "x", 3, reduction=8), np.float32)
        assert reduced.shape == (expected.shape[0] // 8, expected.shape[1] // 8, 3)
        assert abs(reduced - expected[4::8, 4::8]).max() < 4


@pytest.mark.parametrize("value", range(2, 9))
def test_arrays_are_turned_like_images(value: int) -> None:
    grey = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    exif = Image.Exif()
    exif[274] = value
    data = saved(Image.fromarray(grey), "PNG", exif=exif)
    picture = Image.fromarray((grey // 1000).astype(np.uint8))
    picture.getexif()[274] = value
    expected = np.asarray(ImageOps.exif_transpose(picture), np.uint16) * 1000
    assert (np.asarray(decode(data, "x", 1))[..., 0] == expected).all()


def test_a_damaged_orientation_leaves_an_image_as_it_is() -> None:
    data = oriented("JPEG", 6)
    at = data.index(b"\x01\x12")  # the tag, big-endian
    broken = data[: at + 2] + b"\xff" * 8 + data[at + 10 :]
    assert np.asarray(decode(broken, "x", 3)).shape == (48, 64, 3)


def test_sources_take_the_orientation_that_the_recipe_wants(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(oriented("JPEG", 6))
    for orient, size in (("exif", (48, 64)), ("stored", (64, 48))):
        source = registry.build(
            "data.sources",
            {"name": "folder", "path": str(tmp_path), **({"orient": orient} if orient == "stored" else {})},
        )
        assert source[0][0].size == size
