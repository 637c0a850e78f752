"""Features on disk against the same backbone, one image at a time."""

import json
import math

import numpy as np
import pytest
import torch

from dinokit.config import registry
from dinokit.data.transforms import center_crop, resize, to_tensor
from dinokit.features import Extraction, ExtractSpec, extract_to, normalised, open_store
from dinokit.features.extract_store import select_blocks
from dinokit.features.store import shard_size
from dinokit.features.store_write import growing_array


def folder(path):
    return registry.build("data.sources", {"name": "folder", "path": str(path)})


def shown(image, fit: str) -> torch.Tensor:
    """What the backbone sees of an image: written out for each fit, with the patch of 8 and size 40."""
    if fit == "crop":
        return center_crop(image, 37, 32)
    pixels = to_tensor(image)
    height, width = pixels.shape[2:]
    h, w = (max(round(side * 40 / max(height, width)), 1) for side in (height, width))
    if fit == "resize":
        return resize(pixels, round(h / 8) * 8, round(w / 8) * 8)[0]
    whole = torch.zeros(3, math.ceil(h / 8) * 8, math.ceil(w / 8) * 8, dtype=torch.uint8)
    whole[:, :h, :w] = resize(pixels, h, w)[0]
    return whole


@pytest.mark.parametrize("layers", ["last", "last2", [0, 2]])
@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_every_row_is_the_output_of_the_backbone_for_that_image(vit, photos, tmp_path, fit, layers):
    source = folder(photos(11, 3))
    spec = ExtractSpec(
        ("cls", "mean", "patch", "registers"),
        layers,
        fit,
        32 if fit == "crop" else 40,
        dtype="float32",
        shard=4,
    )
    store = extract_to(tmp_path / "out", vit, source, spec, batch=3)
    blocks = {"last": [2], "last2": [1, 2]}.get(str(layers), [0, 2])
    assert len(store) == 11
    assert store.names == [source.name(i) for i in range(11)]
    assert store.valid.tolist() == [i != 3 for i in range(11)]
    for i in range(11):
        rows, columns = store.grid[i]
        if i == 3:
            assert (rows, columns) == (0, 0)
            assert all(np.isnan(store[token][i]).all() for token in ("cls", "mean", "registers"))
            assert np.isnan(store["patch"][i]).all()
            continue
        pixels = shown(source[i][0], fit)
        assert (rows * 8, columns * 8) == pixels.shape[1:]
        with torch.inference_mode():
            tokens = vit.layers(normalised(vit, pixels[None]), blocks)
        want = {
            "cls": [t.cls[0] for t in tokens],
            "mean": [t.patches[0].mean(dim=0) for t in tokens],
            "patch": [t.patches[0] for t in tokens],
            "registers": [t.registers[0] for t in tokens],
        }
        for token, each in want.items():
            value = each[0] if layers == "last" else torch.stack(each, dim=-2)
            np.testing.assert_allclose(store[token][i], value.numpy(), atol=2e-5, err_msg=f"{token} of {i}")


def test_an_array_is_read_by_index_slice_mask_and_shard(vit, photos, tmp_path):
    store = extract_to(tmp_path / "out", vit, folder(photos(10)), ExtractSpec(shard=4, dtype="float16"))
    cls = store["cls"]
    parts = list(cls.shards())
    assert [part.shape for part in parts] == [(4, 24), (4, 24), (2, 24)]
    assert all(isinstance(part, np.memmap) for part in parts)
    whole = np.concatenate(parts)
    assert whole.dtype == cls.dtype == np.float16
    assert cls.shape == (10, 24)
    np.testing.assert_array_equal(cls[3:9], whole[3:9])
    np.testing.assert_array_equal(cls[np.array([9, 0, 5, 5])], whole[[9, 0, 5, 5]])
    np.testing.assert_array_equal(cls[np.arange(10) % 2 == 0], whole[::2])
    np.testing.assert_array_equal(cls[-1], whole[-1])
    np.testing.assert_array_equal(np.asarray(cls), whole)
    with pytest.raises(IndexError):
        cls[10]
    with pytest.raises(LookupError, match="has no 'patch' tokens; it has: cls"):
        store["patch"]


def test_a_store_has_labels_and_its_settings(vit, photos, tmp_path):
    path = photos(6)
    for i, image in enumerate(sorted(path.iterdir())):
        (path / "ab"[i % 2]).mkdir(exist_ok=True)
        image.rename(path / "ab"[i % 2] / image.name)
    source = registry.build("data.sources", {"name": "folder", "path": str(path), "labels": "folders"})
    store = extract_to(tmp_path / "out", vit, source, ExtractSpec(("patch",), fit="pad"))
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]
    about = json.loads((tmp_path / "out" / "store.json").read_text())
    assert about["classes"] == ["a", "b"]
    assert about["transform"] == {
        "fit": "pad", "size": 0, "resize": None, "interpolation": "bicubic, antialiased",
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    assert about["tokens"]["patch"] == {"shape": [6, None, 24], "dtype": "float16"}
    assert len(about["fingerprint"]) == 64


def test_a_shard_without_a_readable_image_is_a_shard(vit, photos, tmp_path):
    source = folder(photos(4, 0, 1))
    store = extract_to(
        tmp_path / "out", vit, source, ExtractSpec(("patch", "cls"), fit="resize", size=32, shard=2)
    )
    assert store["patch"][0].shape == (0, 24)
    assert [len(part) for part in store["patch"].shards()] == [0, sum(len(store["patch"][i]) for i in (2, 3))]
    assert len(store["patch"][3]) == math.prod(store.grid[3])


def test_other_settings_other_weights_and_other_images_are_refused(vit, photos, tmp_path):
    path, out = photos(5), tmp_path / "out"
    extract_to(out, vit, folder(path), ExtractSpec())
    extract_to(out, vit, folder(path), ExtractSpec())  # the same again is no mistake
    with pytest.raises(ValueError, match=r"other settings: tokens was cls, now cls,mean\. Choose"):
        extract_to(out, vit, folder(path), ExtractSpec(("cls", "mean")))
    with pytest.raises(ValueError, match=r"other settings: dtype was float16, now float32\. Choose"):
        extract_to(out, vit, folder(path), ExtractSpec(dtype="float32"))
    with torch.no_grad():
        vit.norm.weight += 1
    with pytest.raises(
        ValueError, match=r"settings: weights was in memory \(\w{8}\), now in memory \(\w{8}\)\. Choose"
    ):
        extract_to(out, vit, folder(path), ExtractSpec())
    with torch.no_grad():
        vit.norm.weight -= 1
    whole = (path / "0002.png").read_bytes()
    (path / "0002.png").write_bytes((path / "0003.png").read_bytes())  # another image under the same name
    with pytest.raises(ValueError, match="other images of the same names: their files have other sizes"):
        extract_to(out, vit, folder(path), ExtractSpec())
    (path / "0002.png").write_bytes(whole)  # the same image at another time
    extract_to(out, vit, folder(path), ExtractSpec())
    (path / "0002.png").rename(path / "0002b.png")
    with pytest.raises(ValueError, match=r"other images: number 2 was '.*0002.png', now '.*0002b.png'"):
        extract_to(out, vit, folder(path), ExtractSpec())


def test_a_folder_with_other_files_is_refused(vit, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and contains no features"):
        extract_to(tmp_path / "out", vit, folder(photos(2)), ExtractSpec())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(LookupError, match="contains no features"):
        open_store(tmp_path / "out")


def test_an_incomplete_store_is_refused(vit, photos, tmp_path):
    extract_to(tmp_path / "out", vit, folder(photos(5)), ExtractSpec(shard=2))
    (tmp_path / "out" / "cls" / "00001.npy").unlink()
    with pytest.raises(ValueError, match=r"not complete: 1 of 3 shards are missing"):
        open_store(tmp_path / "out")


def test_parquet_contains_the_same_numbers(vit, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    source = folder(photos(7, 2))
    for fit in ("crop", "resize"):
        spec = {"tokens": ("cls", "patch"), "fit": fit, "size": 32, "shard": 4}
        store = extract_to(tmp_path / fit, vit, source, ExtractSpec(**spec), batch=3)
        out = tmp_path / f"{fit}-parquet"
        Extraction(out, vit, source, ExtractSpec(**spec, files="parquet")).run(batch=3)
        with pytest.raises(ValueError, match="contains parquet files: read them with pyarrow"):
            open_store(out)
        rows = [row for path in sorted(out.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]
        assert [row["name"] for row in rows] == store.names
        assert [row["valid"] for row in rows] == store.valid.tolist()
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(np.array(row["cls"], np.float16), store["cls"][i])
            np.testing.assert_array_equal(np.array(row["patch"], np.float16), store["patch"][i].ravel())


def test_tokens_and_sizes_that_do_not_fit_are_refused_before_an_image_is_read(vit, photos, tmp_path):
    pixels = registry.build("models", {"name": "pixels"})
    source = folder(photos(2, 0, 1))
    for spec, words in [
        (ExtractSpec(("patch",)), "tokens=patch: this backbone has none"),
        (ExtractSpec(("mean",)), "tokens=mean: this backbone has none"),
        (ExtractSpec(layers="last2"), "blocks|last block only"),
    ]:
        with pytest.raises(ValueError, match=words):
            extract_to(tmp_path / "out", pixels, source, spec)
    for spec, words in [
        (
            ExtractSpec(size=33),
            "size=33 is not a multiple of the backbone's patch, 8 pixels; the nearest is 32",
        ),
        (ExtractSpec(size=32, resize=31), "resize=31 leaves no crop"),
        (ExtractSpec(("clss",)), "there is cls, mean, patch, registers"),
        (ExtractSpec(layers="first"), "layers=first"),
    ]:
        with pytest.raises(ValueError, match=words):
            extract_to(tmp_path / "out", vit, source, spec)
    assert not (tmp_path / "out").exists()


def test_features_too_large_for_float16_are_refused(vit, photos, tmp_path):
    with torch.no_grad():
        vit.norm.weight *= 1e6
    with pytest.raises(ValueError, match="not finite: the weights are broken; or float16 is too narrow"):
        extract_to(tmp_path / "out", vit, folder(photos(3)), ExtractSpec())
    extract_to(tmp_path / "wide", vit, folder(photos(3)), ExtractSpec(dtype="float32"))


def test_layers_are_blocks(vit):
    assert select_blocks("last", vit) == [2]
    assert select_blocks("last3", vit) == [0, 1, 2]
    assert select_blocks([2, 0], vit) == [0, 2]
    for wrong in ("last4", "last0", "lats", [3], [-1], []):
        with pytest.raises(ValueError, match="layers="):
            select_blocks(wrong, vit)


@pytest.mark.parametrize(("row", "images"), [(768, 4096), (1369 * 384 * 2, 128), (1 << 30, 1)])
def test_a_shard_is_a_power_of_two_and_no_file_is_above_256_mib(row, images):
    assert shard_size(row) == images


def test_a_growing_array_is_a_plain_npy_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(12_345, 3)).astype(np.float32)
    with growing_array(tmp_path / "x.npy", (3,), np.dtype("float32")) as append:
        for part in np.array_split(rows, 7):
            append(part)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows)
    np.save(tmp_path / "y.npy", rows)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_an_image_that_is_not_there_is_an_error_with_the_number_of_images(vit, photos, tmp_path):
    store = extract_to(
        tmp_path / "out", vit, folder(photos(3)), ExtractSpec(("cls", "patch"), fit="resize", size=32)
    )
    for token in ("cls", "patch"):
        assert (store[token][-1] == store[token][2]).all()
        for wrong in (3, -4):
            with pytest.raises(IndexError, match=f"no image {wrong}: the store has 3, numbered from 0"):
                store[token][wrong]
