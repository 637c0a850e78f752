"""DICOM files, written by pydicom, against its own functions and against plain arithmetic."""

import io

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from dinokit.data import decode
from dinokit.data.sources import folder


def dicom(array, photometric="MONOCHROME2", **tags) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = array.shape[:2]
    file.SamplesPerPixel = 3 if array.ndim == 3 else 1
    if array.ndim == 3:
        file.PlanarConfiguration = 0
    file.PhotometricInterpretation = photometric
    file.BitsAllocated = file.BitsStored = 8 * array.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(array.dtype.kind == "i")
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = array.tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, file, enforce_file_format=True)
    return out.getvalue()


CT = np.arange(-500, 1540, dtype=np.int16)[:2000].reshape(40, 50)


def test_a_window_is_applied_as_pydicom_applies_it():
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    data = dicom(CT, **tags)
    found = decode.decode(data, "a", 1)
    theirs = apply_voi_lut(CT.astype(np.float64) * 2 - 1024, pydicom.dcmread(io.BytesIO(data)))
    low, high = theirs.min(), theirs.max()  # this image is wider than the window
    assert found.shape == (40, 50, 1)
    assert found.dtype == np.float32
    assert np.allclose(found[..., 0], (theirs - low) / (high - low), atol=1e-6)
    assert (found.min(), found.max()) == (0, 1)


def test_without_a_window_the_range_is_used_and_monochrome1_is_inverted():
    plain, inverted = (decode.decode(dicom(CT, kind), "a", 3) for kind in ("MONOCHROME2", "MONOCHROME1"))
    assert plain.shape == (40, 50, 3)
    assert np.allclose(plain[..., 1], (CT + 500) / (CT.max() + 500), atol=1e-6)
    assert np.allclose(plain + inverted, 1)


def test_colour_stays_as_it_is_stored():
    array = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(decode.decode(dicom(array, "RGB"), "a", 3), array)


def test_a_folder_finds_dicom_files_and_limits_hold(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(dicom(CT))
    source = folder.build(folder.Config(str(tmp_path), channels=1))
    assert source[0][0].shape == (40, 50, 1)
    small = folder.build(folder.Config(str(tmp_path), max_pixels=100))
    with pytest.raises(ValueError, match=r"50 x 40 pixels, more than max_pixels=100"):
        small[0]
    (tmp_path / "scan.dcm").write_bytes(dicom(CT)[:-100])
    with pytest.raises(ValueError, match=r"scan\.dcm cannot be read"):
        source[0]


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("dinokit.data.dicom.installed", lambda: False)
    with pytest.raises(ValueError, match="pip install pydicom"):
        decode.decode(dicom(CT), "a", 1)
