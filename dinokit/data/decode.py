"""Decodes the bytes of image files and of maps, and makes images of what Python code has in memory.

Pillow reads everything but `.npy` arrays, DICOM (dinokit.data.dicom) and those TIFF files that it would
reduce to 8 bits or 3 bands, which tifffile reads. torchvision.io is not used:
its PNG reader crashes on a damaged file (0.29.1).
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from dinokit.data import dicom
from dinokit.runtime.files import read_regular

# An 8-bit image in mode RGB or L; or an array (H, W, C) of uint8, uint16, or float32 in [0, 1].
ImageLike = Image.Image | np.ndarray
Orient = Literal["exif", "stored"]

# What reading a damaged or missing image raises.
UNREADABLE = OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError

SUFFIXES: tuple[str, ...] = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2", ".pbm", ".pgm",
    ".ppm", ".npy",
)  # fmt: skip

# What Pillow may read, whatever a file's name is: of EPS, for one, it would run the program inside.
FORMATS = "JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF"
MAX_PIXELS = 89_478_485  # of an image: where Pillow warns, a quarter of a GiB in RGB

LIMIT = "max_pixels={}. Make it smaller, or raise the limit (data.max_pixels in a recipe)."
HEIC = (".heic", ".heif")  # read by pillow-heif, where that is installed
if find_spec("pillow_heif") is not None:
    SUFFIXES += HEIC
if dicom.installed():
    SUFFIXES += dicom.SUFFIXES
_LUMA = np.array([19595, 38470, 7471], np.uint32)  # ITU-R 601, times 65536: the integers that Pillow uses
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _SAMPLES = 258, 277  # TIFF tags: bits per sample, samples per pixel
_ORIENTATION = 274  # EXIF tag
_TURNS: dict[int, Image.Transpose | None] = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The same for arrays: quarter turns to the left, then whether to mirror left and right.
_NUMPY_TURNS = {
    2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False),
}  # fmt: skip
_RGB = 2  # TIFF photometric interpretation


def suffix(name: str) -> str:
    """'.jpg' of 'a/B.JPG'; empty if there is none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") + 1 else ""


def jpeg_size(data: bytes, orient: Orient = "exif") -> tuple[int, int] | None:
    """Width and height of a JPEG, from its header, as decode() gives it; None for others and damaged ones."""
    try:
        image = Image.open(BytesIO(data), formats=("JPEG", "MPO"))
    except Exception:  # as in decode(), which then raises an error that says what is wrong
        return None
    if not isinstance(image, JpegImageFile):
        return None
    return image.size[::-1] if orient == "exif" and _orientation(image) >= 5 else image.size


def decode(
    data: bytes,
    name: str,
    channels: int,
    reduction: int = 1,
    max_pixels: int = MAX_PIXELS,
    orient: Orient = "exif",
) -> ImageLike:
    """The image in `data`, with `channels` channels.

    With 3 channels it is RGB and with 1 it is grey, converted if necessary as Pillow's `convert` does: a
    palette is applied, alpha is dropped. With any other number the file must have exactly that many, and they
    are returned as stored. 16 bits stay 16 bits in PNG, TIFF, `.npy` and grey PGM; Pillow reads JPEG 2000,
    AVIF and colour PPM with 8. The first frame or page of several is read. An array in `.npy` is (H, W)
    or (H, W, C).

    Args:
        data: the whole file.
        name: what to call it in messages.
        channels: as `backbone.channels`.
        reduction: 2, 4 or 8 decodes a JPEG with its sides divided by that, rounded up: libjpeg omits the
            higher frequencies of each block of 8 x 8 pixels. Other formats are always decoded at full size.
        max_pixels: a header with more is refused before its pixels are read.
        orient: exif turns the image upright, as its EXIF orientation says; stored leaves it as the pixels
            lie in the file. TIFF is always upright, as Pillow reads it.

    Returns:
        For 8 bits and 1 or 3 channels a loaded Pillow image in mode L or RGB; otherwise an array
        (H, W, channels) of uint8, uint16, or float32 in [0, 1].

    Raises:
        ValueError: if the file is damaged, cut short or in no known format, if its channels or values do not
            fit, or if it has too many pixels; the message begins with `name`.
    """
    with _named_errors(data, name):
        if data.startswith(_NPY):
            return _checked(_npy(data, max_pixels), channels)
        if data.startswith(_TIFF):
            return _tiff(data, channels, max_pixels)
        if dicom.is_dicom(data):
            _check_pixels(*dicom.header_size(data), max_pixels)
            return _colour(dicom.pixels(data), channels, alpha=False)
        image = open_image(data, max_pixels)
        stored = image.tile[0].args if image.format == "PNG" and image.tile else None
        if stored in ("LA;16B", "RGB;16B", "RGBA;16B"):
            result: ImageLike = _deep_png(data, str(stored), channels)
        else:
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            result = _pillow(image, channels)
        return _upright(result, _orientation(image)) if orient == "exif" else result


def as_image(image: Any, channels: int, name: str = "the image") -> ImageLike:
    """What Python code calls an image, with `channels` channels, as decode() gives it.

    Args:
        image: a path, the bytes of a file, a Pillow image (turned upright by its EXIF orientation), an array
            (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W). Arrays and tensors are of uint8, uint16 or
            floats in [0, 1]; with 2 or 4 channels the last is alpha, if 1 or 3 are asked for.
        channels: as for decode().
        name: what to call it in messages.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if it is something else, or its channels or values do not fit.
    """
    if isinstance(image, str | Path):
        return decode(read_regular(image), str(image), channels)
    if isinstance(image, bytes):
        return decode(image, name, channels)
    try:
        if isinstance(image, Image.Image):
            return _upright(_pillow(image, channels), _orientation(image))
        if hasattr(image, "detach"):  # a tensor
            image = image.detach().cpu().numpy()
            image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
        if not isinstance(image, np.ndarray):
            raise ValueError(  # noqa: TRY301 - the name is added below
                f"it is a {type(image).__name__}; an image is a path, a Pillow image, an array or a tensor."
            )
        return _colour(image, channels, alpha=image.ndim == 3 and image.shape[2] in (2, 4))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright, and stands for a missing or damaged one."""
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels may be whole
        return 1
    return value if value in _TURNS else 1


def _upright(image: ImageLike, orientation: int) -> ImageLike:
    turn = _TURNS[orientation]
    if turn is None:
        return image
    if isinstance(image, Image.Image):
        upright = image.transpose(turn)
        upright.info = {}  # Pillow keeps the orientation there: whoever reads it would turn the image again
        return upright
    rotations, mirrored = _NUMPY_TURNS[orientation]
    return np.ascontiguousarray(np.rot90(image, rotations)[:, :: -1 if mirrored else 1])


@contextmanager
def _named_errors(data: bytes, name: str) -> Iterator[None]:
    """Raise any error of a decoder as a ValueError with `name`."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} cannot be read: {len(data)} bytes that do not begin like an image format."
        ) from None
    except Exception as error:  # a damaged file may raise anything: SyntaxError, struct.error, zlib.error
        raise ValueError(f"{name} cannot be read: {error}") from error


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """The image with its header read; a ValueError for one of more pixels, and for a damaged PNG."""
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels
    if data[4:8] == b"ftyp" and find_spec("pillow_heif") is not None:
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    try:
        image = Image.open(BytesIO(data), formats=[each for each in FORMATS if each in Image.OPEN])
    except Image.DecompressionBombError:
        raise ValueError(f"it has far more pixels than {LIMIT.format(max_pixels)}") from None
    _check_pixels(*image.size, max_pixels)
    if image.format == "PNG":
        _check_png(memoryview(data))
    return image


def _check_png(data: memoryview) -> None:
    """Compare the checksums of the chunks that decide pixels: Pillow passes over a wrong one."""
    place = 8
    while place + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 8 + size
        wrong = zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big")
        if wrong and kind in (b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"IEND"):
            raise ValueError(f"it is damaged: the checksum of its chunk {kind.decode()} does not match.")
        place = end + 4


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise ValueError(f"it has {width} x {height} pixels, more than {LIMIT.format(most)}")


def _npy(data: bytes, max_pixels: int) -> np.ndarray:
    """The array of a `.npy` file, whose header must fit the file: numpy allocates what it says."""
    file = BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > len(data):
        raise ValueError(f"its header says {shape} of {kind}, which the {len(data)} bytes do not hold.")
    if len(shape) > 1:
        _check_pixels(shape[1], shape[0], max_pixels)
    return np.asarray(np.load(BytesIO(data), allow_pickle=False))


def decode_map(data: bytes, name: str) -> np.ndarray:
    """The numbers of a map, one per pixel, as stored: (H, W) of uint8, uint16, int32 or float32.

    A palette is not applied: its indices are the numbers.

    Raises:
        ValueError: if the file is damaged, in no known format, in JPEG, or has more than one channel; the
            message begins with `name`.
    """
    with _named_errors(data, name):
        if data.startswith(_NPY):
            array, jpeg = _npy(data, MAX_PIXELS), False
        else:
            image = open_image(data, MAX_PIXELS)
            array, jpeg = np.array(image), image.format == "JPEG"
    if jpeg:
        raise ValueError(f"{name} is a JPEG, whose compression changes numbers: store maps as PNG.")
    return _numbers(array, name)


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 2:
        raise ValueError(
            f"{name} has the shape {array.shape}: a map has one number per pixel, so one channel. Convert "
            f"colours to ids first."
        )
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} has values of type {array.dtype}, which are not numbers.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _pillow(image: Image.Image, channels: int) -> ImageLike:
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        array = np.array(image)
        if array.dtype == np.int32 and array.min() >= 0 and array.max() <= np.iinfo(np.uint16).max:
            array = array.astype(np.uint16)  # Pillow reads 16 bits of some formats as 32
        return _colour(array, channels, alpha=False)
    if channels not in (1, 3):
        return _checked(np.array(image), channels)
    mode = "RGB" if channels == 3 else "L"
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert(mode)  # Pillow warns if this is one step
    return image if image.mode == mode else image.convert(mode)


def _deep_png(data: bytes, stored: str, channels: int) -> np.ndarray:
    """A PNG of 16 bits with colour or alpha; `stored` is Pillow's name for the order of its bytes.

    Pillow has no mode for these and returns the upper bytes only. A second reading, which declares the
    big-endian numbers as little-endian, returns the lower bytes.
    """
    if stored == "LA;16B":  # a pixel has as many bytes as one of RGBA
        array = _planes(data, "RGBA").view(">u2").astype(np.uint16)
    else:
        high, low = _planes(data, stored), _planes(data, stored.replace("16B", "16L"))
        array = (high.astype(np.uint16) << 8) | low
    return _colour(array, channels, alpha=array.shape[2] != 3)


def _planes(data: bytes, order: str) -> np.ndarray:
    image = Image.open(BytesIO(data), formats=("PNG",))
    image.tile = [image.tile[0]._replace(args=order)]
    return np.array(image)  # (H, W, C) uint8


def _tiff(data: bytes, channels: int, max_pixels: int) -> ImageLike:
    try:
        image = open_image(data, max_pixels)
    except UnidentifiedImageError:
        return _many_bands(data, channels, max_pixels)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    fits_pillow = max(tags.get(_BITS, (1,))) <= 8 or image.mode in ("I;16", "I;16B", "F")
    if fits_pillow and tags.get(_SAMPLES, 1) == len(image.getbands()):
        return _pillow(image, channels)
    return _many_bands(data, channels, max_pixels)


def _many_bands(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    try:
        tifffile = import_module("tifffile")
    except ModuleNotFoundError:
        raise ValueError(
            "TIFF files with many bands or 16-bit colour need: pip install '.[tiff]' in the clone"
        ) from None
    with tifffile.TiffFile(BytesIO(data)) as file:
        series = file.series[0]
        axes = series.axes
        if not {"Y", "X"} <= set(axes) or len(axes) > 3:
            raise ValueError(f"its axes are {axes}; an image must have Y, X and at most one more.")
        _check_pixels(series.shape[axes.index("X")], series.shape[axes.index("Y")], max_pixels)
        if series.size > max_pixels * max(channels, 4):
            raise ValueError(f"its shape {series.shape} has too many bands.")
        bands = [i for i, axis in enumerate(axes) if axis not in "YX"]
        array = series.asarray().transpose(axes.index("Y"), axes.index("X"), *bands)
        if series.keyframe.photometric != _RGB and array.ndim == 3:
            return _checked(array, channels)
        return _colour(array, channels, alpha=bool(set(series.keyframe.extrasamples) & {1, 2}))


def _colour(array: np.ndarray, channels: int, alpha: bool) -> np.ndarray:
    """Convert between grey and RGB, and drop alpha, if `channels` is 1 or 3."""
    array = array[..., None] if array.ndim == 2 else array
    if channels in (1, 3) and array.shape[2] != channels:
        array = array[..., :-1] if alpha else array
        if array.shape[2] == 1:
            array = array.repeat(3, axis=2) if channels == 3 else array
        elif array.shape[2] == 3 and channels == 1:
            array = _grey(array)
    return _checked(array, channels)


def _grey(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return (array @ (_LUMA / 65536).astype(array.dtype))[..., None]
    return ((array.astype(np.uint32) @ _LUMA + np.uint32(1 << 15)) >> 16).astype(array.dtype)[..., None]


def _checked(array: np.ndarray, channels: int) -> np.ndarray:
    """The array as (H, W, channels), uint8, uint16 or float32.

    Raises:
        ValueError: if its shape or its values do not fit.
    """
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size:
        raise ValueError(f"its shape is {array.shape}; an image must be (height, width, channels).")
    if array.shape[2] != channels:
        raise ValueError(
            f"it has {array.shape[2]} channels, but backbone.channels is {channels}. "
            f"Set backbone.channels={array.shape[2]}, or store the image with {channels}."
        )
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"its values range from {array.min():g} to {array.max():g}; floats must be in [0, 1]."
            )
        return np.ascontiguousarray(array, np.float32)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(f"its values are {array.dtype}; it must be uint8, uint16 or floats in [0, 1].")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
