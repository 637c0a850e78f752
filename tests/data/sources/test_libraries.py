"""Data sets of Hugging Face and torchvision, as these libraries write them, and images in memory."""

import io
import json
import pickle
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.data.decode import decode
from dinokit.data.sources.memory import as_source


def png(n: int, mode: str = "RGB") -> bytes:
    """A file of 9 x 7 pixels whose pixels depend on n."""
    values = np.random.default_rng(n).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, "PNG")
    return file.getvalue()


def build(name, **values):
    return registry.build("data.sources", {"name": name, **values})


def table(count: int, start: int = 0, classes=("cat", "dog")):
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    rows = {
        "picture": [{"bytes": png(start + i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def same(source, index, file: bytes, channels=3) -> bool:
    return np.array_equal(np.asarray(source[index][0]), np.asarray(decode(file, "", channels)))


@pytest.fixture
def saved(tmp_path):
    parts = {"train": table(6), "test": table(3, start=100)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    return str(tmp_path / "set")


def test_a_saved_data_set_gives_its_pixels_labels_and_splits(saved):
    source = build("hf", path=saved, split="test")
    assert len(source) == 3
    assert source.classes == ["cat", "dog"]
    assert [source[i][1] for i in range(3)] == [0, 1, 0]
    assert all(same(source, i, png(100 + i)) for i in range(3))
    assert source.name(2) == f"{saved} test row 2"
    whole = build("hf", path=saved)
    assert len(whole) == 9
    assert len(build("hf", path=saved, split="train")) == 6
    assert source.stamp() != whole.stamp()
    again = pickle.loads(pickle.dumps(source))
    assert same(again, 1, png(101))


def test_channels_are_those_of_the_backbone_as_for_files(saved):
    source = build("hf", path=saved, channels=1)
    assert same(source, 0, png(0), channels=1)
    with pytest.raises(ValueError, match=r"has 3 channels, but backbone.channels is 5"):
        build("hf", path=saved, channels=5)[0]


def test_a_folder_of_parquet_files_is_opened_by_its_path(tmp_path):
    table(4).to_parquet(str(tmp_path / "train.parquet"))
    source = build("hf", path=str(tmp_path))
    assert [source[i][1] for i in range(4)] == [0, 1, 0, 1]
    assert same(source, 3, png(3))


def test_one_data_set_without_splits_is_split_by_a_hash(tmp_path):
    table(40).save_to_disk(str(tmp_path / "one"))
    train, test = (build("hf", path=str(tmp_path / "one"), split=split) for split in ("train", "test"))
    names = [{each.name(i) for i in range(len(each))} for each in (train, test)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 40


def test_what_is_wrong_with_a_data_set_is_named(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no column 'pictures'.*Did you mean 'picture'.*Set image=COLUMN"):
        build("hf", path=saved, image="pictures")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"no folder that save_to_disk\(\) wrote"):
        build("hf", path=str(tmp_path / "nothing"))


def test_floats_are_labels_if_they_are_whole(tmp_path):
    for name, values in {"whole": [10.0, 9.0, None], "ages": [1.0, 0.5, 2.0]}.items():
        features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("float32")})
        rows = {"picture": [{"bytes": png(i), "path": None} for i in range(3)], "label": values}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / name))
    source = build("hf", path=str(tmp_path / "whole"))
    assert source.classes == ["9", "10"]
    assert [source[i][1] for i in range(3)] == [1, 0, -1]
    with pytest.raises(ValueError, match=r"Column 'label' of .*ages has 1 .* 0\.5, in row 1 .*label=COLUMN"):
        build("hf", path=str(tmp_path / "ages"))
    assert build("hf", path=str(tmp_path / "ages"), label="").classes == []


def idx(path, array):
    """A file in the format of MNIST: two zeros, the type 8 (uint8), the dimensions."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def fashion(tmp_path):
    raw, rng = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0)
    pixels = rng.integers(0, 255, (9, 28, 28), dtype=np.uint8)
    for name, rows in (("train", slice(0, 6)), ("t10k", slice(6, 9))):
        idx(raw / f"{name}-images-idx3-ubyte", pixels[rows])
        idx(raw / f"{name}-labels-idx1-ubyte", np.arange(9, dtype=np.uint8)[rows])
    return tmp_path, pixels


def test_a_torchvision_data_set_with_its_own_splits(fashion):
    root, pixels = fashion
    values = {"path": str(root), "dataset": "FashionMNIST", "channels": 1}
    test = build("torchvision", **values, split="test")
    assert [test[i][1] for i in range(3)] == [6, 7, 8]
    assert np.array_equal(np.asarray(test[1][0]), pixels[7])
    assert len(test.classes) == 10
    assert len(build("torchvision", **values, split="train")) == 6
    whole = build("torchvision", **values)
    assert [whole[i][1] for i in range(9)] == list(range(9))
    assert (whole.name(0), whole.name(8)) == ("FashionMNIST train 0", "FashionMNIST test 2")
    assert np.asarray(build("torchvision", **{**values, "channels": 3})[0][0]).shape == (28, 28, 3)


def test_a_torchvision_data_set_that_calls_its_argument_split(tmp_path):
    root = tmp_path / "food-101"
    for name in ("a/1", "a/2", "b/1"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / f"{name}.jpg").write_bytes(png(len(name)))
    (root / "meta").mkdir()
    (root / "meta/train.json").write_text(json.dumps({"a": ["a/1"], "b": []}))
    (root / "meta/test.json").write_text(json.dumps({"a": ["a/2"], "b": ["b/1"]}))
    test = build("torchvision", path=str(tmp_path), dataset="Food101", split="test")
    assert (list(test.classes), [test[i][1] for i in range(2)]) == (["a", "b"], [0, 1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Caltech101 closes no file
@pytest.mark.parametrize(("dataset", "own"), [("Caltech101", "caltech101"), ("SUN397", "SUN397")])
def test_other_files_beside_a_torchvision_data_set_do_not_change_its_stamp(dataset, own, tmp_path):
    names = {"Caltech101": "101_ObjectCategories/ant/image_0001.jpg", "SUN397": "a/ant/sun_1.jpg"}
    file = tmp_path / own / names[dataset]
    file.parent.mkdir(parents=True)
    file.write_bytes(png(0))
    (tmp_path / own / "ClassName.txt").write_text("/a/ant\n")
    (tmp_path / own / "101_ObjectCategories" / "BACKGROUND_Google").mkdir(parents=True, exist_ok=True)
    source = build("torchvision", path=str(tmp_path), dataset=dataset)
    stamp = source.stamp()
    (tmp_path / "photos").write_text("of somebody else")
    assert source.stamp() == stamp
    file.write_bytes(png(0) + b" ")
    assert source.stamp() != stamp


def test_the_stamp_of_a_torchvision_data_set_follows_its_own_files_split_and_settings(
    fashion, tmp_path, monkeypatch
):
    root, _ = fashion
    monkeypatch.chdir(root.parent)
    values = {"dataset": "FashionMNIST", "channels": 1}
    test = build("torchvision", path=str(root), **values, split="test")
    stamp = test.stamp()
    assert build("torchvision", path=str(root), **values, split="test").stamp() == stamp
    assert build("torchvision", path=root.name, **values, split="test").stamp() == stamp
    others = [{"split": "train"}, {"split": "all"}, {"split": "test", "channels": 3}]
    stamps = {build("torchvision", **{"path": str(root), **values, **other}).stamp() for other in others}
    assert len(stamps | {stamp}) == 4
    (root / "another_data_set").write_text("downloaded later")
    assert test.stamp() == stamp
    file = root / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert test.stamp() != stamp


def test_a_torchvision_data_set_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(LookupError, match="Did you mean 'CIFAR10'"):
        build("torchvision", path=str(tmp_path), dataset="CIFAR-10")
    with pytest.raises(ValueError, match=r"CIFAR10 cannot be opened.*download=true fetches it"):
        build("torchvision", path=str(tmp_path), dataset="CIFAR10")


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.open(io.BytesIO(png(index))), torch.tensor(index % 3)


def test_a_dataset_of_torch_is_a_source():
    source = as_source(Pairs())
    assert list(source.classes) == ["0", "1", "2"]
    assert [source[i][1] for i in range(4)] == [0, 1, 2, 0]
    assert same(source, 2, png(2))
    assert source.name(2) == "Pairs 2"


PICTURE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (2.0, 2), (np.float32(1), 1), (torch.tensor(3.0), 3), (np.int64(2), 2), (True, 1), (-1, -1),
        (float("nan"), -1), (None, -1), ("cat", -1), (torch.zeros(4), -1), ([0.5, 0.5], -1),
    ],
)  # fmt: skip
def test_a_label_in_memory_is_a_whole_number_or_none(given, label):
    assert as_source([(PICTURE, given)])[0][1] == label
    assert as_source([{"image": PICTURE, "label": given}])[0][1] == label


@pytest.mark.parametrize("wrong", [0.7, np.float32(1.5), torch.tensor(0.5), float("inf")])
def test_a_label_in_memory_that_is_not_whole_is_refused_before_images_are_read(wrong):
    with pytest.raises(ValueError, match=rf"list 0 has the label {float(wrong):g}\. .*item\[0\] for item"):
        as_source([(PICTURE, wrong)])
    later = as_source([(PICTURE, 1.0), (PICTURE, wrong)])
    for read in (lambda: later[1], lambda: later.classes):
        with pytest.raises(ValueError, match="list 1 has the label"):
            read()


def test_a_first_item_that_cannot_be_read_is_an_unreadable_image_and_no_more():
    class Damaged(Pairs):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("damaged")
            return super().__getitem__(index)

    source = as_source(Damaged())
    assert source[1][1] == 1
    with pytest.raises(OSError, match="damaged"):
        source[0]


def test_a_path_a_picture_an_array_and_a_tensor_are_the_same_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    picture = Image.open(tmp_path / "a.png")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).movedim(2, 0)
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        picture,
        array,
        tensor,
        [array],
        array[None],
        png(5),
    ]
    for form in forms:
        source = as_source(form)
        assert len(source) == 1
        assert same(source, 0, png(5)), form
        assert source[0][1] == -1
    assert as_source(tmp_path).name(0) == str(tmp_path / "a.png")
    floats = as_source(tensor / 255)[0][0]
    assert np.allclose(floats, array / 255)


def test_what_is_no_image_is_refused_by_its_name():
    with pytest.raises(ValueError, match="this is a int"):
        as_source(3)
    with pytest.raises(ValueError, match="list 1 cannot be read: it is a object"):
        as_source([np.zeros((4, 4, 3), np.uint8), object()])[1]
    with pytest.raises(ValueError, match=r"values range from 0 to 255; floats must be in \[0, 1\]"):
        as_source(np.full((4, 4, 3), [0.0, 9, 255]))[0]


def test_a_recipe_cannot_build_images_that_were_in_memory():
    with pytest.raises(ValueError, match=r"memory \(12 drawings\).*train.path and test.path"):
        build("memory", about="12 drawings")
