"""Reads the pixels of DICOM files (DICOM PS3.3 C.7.6.3 and C.11), by pydicom."""

from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np

SUFFIXES = (".dcm", ".dicom")
INSTALL = "pip install pydicom"
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax whose data set is compressed as a whole


def is_dicom(data: bytes) -> bool:
    """Whether a file begins with the preamble of DICOM: 128 bytes, then DICM."""
    return data[128:132] == b"DICM"


def installed() -> bool:
    """Whether pydicom is there."""
    return find_spec("pydicom") is not None


def pixels(data: bytes) -> np.ndarray:
    """The first frame as a person would see it: (H, W) float32 in [0, 1], or (H, W, 3) uint8 or uint16.

    Grey values are rescaled to the units of the device (modality LUT), cut to the window that the file names
    (VOI LUT; without one, to their range), and inverted if 0 stands for white. Colour becomes RGB.

    Raises:
        ValueError: if pydicom or a decoder of its compression is missing, or the file has no image.
    """
    if not installed():
        raise ValueError(f"DICOM files are read by pydicom, which is not installed: {INSTALL}")
    pydicom, tools = import_module("pydicom"), import_module("pydicom.pixels")
    dataset = pydicom.dcmread(BytesIO(data))
    if "PixelData" not in dataset:
        raise ValueError("it is a DICOM file without pixels, such as a report")
    array = tools.pixel_array(dataset, index=0)
    if array.ndim == 3:
        return np.asarray(array)
    return _grey(array, dataset, tools)


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, as the header says, without reading the pixels; 0, 0 if it does not."""
    if not installed():
        return 0, 0
    if DEFLATED in data:  # wherever: what stands before the transfer syntax may be of any length
        raise ValueError("it is a deflated DICOM file, which may be of any size: store it without deflation")
    dataset: Any = import_module("pydicom").dcmread(BytesIO(data), stop_before_pixels=True)
    return int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0)


def _grey(array: np.ndarray, dataset: Any, tools: Any) -> np.ndarray:
    values = np.asarray(tools.apply_modality_lut(array, dataset))
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        shown = np.asarray(tools.apply_voi_lut(values, dataset), np.float64) / (2**bits - 1)
    elif "WindowWidth" in dataset:
        shape = str(dataset.get("VOILUTFunction") or "LINEAR")
        shown = _window(values, _first(dataset.WindowCenter), _first(dataset.WindowWidth), shape)
    else:
        low, high = float(values.min()), float(values.max())
        shown = (values - low) / max(high - low, 1e-12)
    shown = np.clip(shown, 0, 1).astype(np.float32)
    return 1 - shown if dataset.get("PhotometricInterpretation") == "MONOCHROME1" else shown


def _window(values: np.ndarray, center: float, width: float, shape: str) -> np.ndarray:
    """The function of C.11.2.1.2 and C.11.2.1.3, from values to 0 (black) and 1 (white), unclipped."""
    if shape == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if shape == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    return (values - (center - 0.5)) / max(width - 1, 1e-12) + 0.5


def _first(value: Any) -> float:
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)
