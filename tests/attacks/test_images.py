"""What an attacker did with images, their archives and masks that others open: each test does the same."""

import io
import json
import os
import tarfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dinokit.data.decode import decode
from dinokit.data.objects import coco, rle
from dinokit.data.sources import parquet, tar, torchvision


def png(size=20):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_postscript_that_is_called_an_image_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")  # in place of Ghostscript
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    with suppress(Exception):
        Image.open(io.BytesIO(postscript)).load()
    assert (tmp_path / "ran").exists()  # Pillow runs it
    (tmp_path / "ran").unlink()
    with pytest.raises(ValueError, match="do not begin like an image format"):
        decode(postscript, "a.png", 3)
    assert not (tmp_path / "ran").exists()


def test_a_png_whose_pixels_do_not_match_their_checksum_is_refused():
    data = bytearray(png(size=64))
    wrong = 0
    for place in range(60, len(data) - 20, 37):
        data[place] ^= 1
        with pytest.raises(ValueError, match=r"^a\.png cannot be read"):
            decode(bytes(data), "a.png", 3)
        wrong += 1
        data[place] ^= 1
    assert wrong > 100
    decode(bytes(data), "a.png", 3)


@pytest.mark.parametrize("before", [0, 2000])  # bytes in front of the transfer syntax
def test_a_deflated_dicom_file_is_not_inflated(before):
    pytest.importorskip("pydicom")
    private = b"\x02\0\x02\0UI" + before.to_bytes(2, "little") + bytes(before)
    syntax = b"\x02\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"
    packed = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = bytes(128) + b"DICM" + private + syntax + packed.compress(bytes(10**7)) + packed.flush()
    with pytest.raises(ValueError, match="deflated DICOM"):
        decode(bomb, "a.dcm", 1)


@pytest.mark.parametrize("column", ["image", "label", "split"])
def test_parquet_whose_columns_would_fill_the_memory_is_refused(column, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": pa.array([png()]), column: pa.array([bytes(1 << 27)])}
    path = tmp_path / "packed.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(ValueError, match=r"packed\.parquet has .* made to fill the memory"):
        parquet.build(parquet.Config(path=str(path)))


def test_parquet_of_more_rows_than_bytes_is_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zeros = pa.array(np.zeros(100_000, np.int8))
    columns = {key: pa.DictionaryArray.from_arrays(zeros, pa.array([b"x"])) for key in ("image", "label")}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"rows\.parquet has .* made to fill the memory"):
        parquet.build(parquet.Config(path=str(tmp_path / "rows.parquet")))


def test_a_long_label_that_many_rows_have_is_in_memory_once(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image, label = png(), "x" * 200_000
    columns = {"image": [image] * 2000, "label": [label, "y"] * 1000}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.proxy_memory_pool(usual))  # which counts what is read here
    try:
        source = parquet.build(parquet.Config(path=str(tmp_path / "a.parquet")))
    finally:
        pa.set_memory_pool(usual)
    assert (list(source.classes), source[0][1], source[1][1]) == ([label, "y"], 0, 1)
    del source  # before its pool
    assert 0 < pool.max_memory() < 50 << 20  # the labels of all rows are 200 MB


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_that_many_rows_have_is_in_memory_once(nested, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([png(300)]))
    column = pa.StructArray.from_arrays([images], ["bytes"]) if nested else images
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet", store_schema=False)
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool := pa.proxy_memory_pool(usual))  # which counts what is read here
    try:
        source = parquet.build(parquet.Config(path=str(tmp_path / "a.parquet")))
    finally:
        pa.set_memory_pool(usual)
    assert source[1999][0].size == (300, 300)
    del source  # before its pool
    assert 0 < pool.max_memory() < 50 << 20  # the images of all rows are 540 MB


def test_a_tar_member_of_a_negative_size_does_not_repeat_for_ever(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name in "abc":
            info = tarfile.TarInfo(f"{name}.png")
            info.size = 512
            file.addfile(info, io.BytesIO(bytes(512)))
    data = bytearray(path.read_bytes())
    block = data[1024:1536]  # the header of b.png: its next member is b.png
    block[124:136] = b"\xff" + (256**11 - 512).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[1024:1536] = block
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar is damaged.*member a\.png follows one of a negative size"):
        tar.build(tar.Config(path=str(path)))


def test_images_that_a_tar_has_as_links_are_counted(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name in ("a.png", "b.png", "c.png"):
            file.add(tmp_path / name, name)
    assert len(tar.build(tar.Config(path=str(tmp_path / "x.tar")))) == 1
    assert "2 links and sparse files" in capsys.readouterr().err


def test_a_data_set_of_torchvision_that_runs_a_pickle_is_refused(tmp_path):
    with pytest.raises(LookupError, match="LSUN runs a pickle"):
        torchvision.build(torchvision.Config(path=str(tmp_path), dataset="LSUN"))


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [4, 5], "counts": [2**62, 2**62, 2**62, 2**62, 20]},  # 2 ** 64 + 20
        {"size": [4, 5], "counts": [2**70]}, {"size": [-4, -5], "counts": [20]},
        {"size": [4, 5], "counts": [1e400]}, {"size": [4, 5], "counts": "p" * 3_000_000},
        {"size": [2**40, 2**40], "counts": [2**80]},
    ],
    ids=range(6),
)  # fmt: skip
def test_runs_of_a_mask_that_are_no_runs_are_refused_at_once(mask):
    with pytest.raises(ValueError, match=r"^a\.json"):
        rle.from_json(mask, "a.json")


def test_a_mask_much_larger_than_its_image_is_never_made(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    content = {
        "categories": [{"id": 1, "name": "a"}],
        "images": [{"id": 1, "file_name": "a.png", "height": 10**7, "width": 10**7}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    source = coco.build(coco.Config(path=str(tmp_path), annotations="a.json"))
    with pytest.raises(ValueError, match="the masks have 10000000 x 10000000 pixels, the image 20 x 20"):
        source[0]
