"""What an attacker did with stores of features that others open: each test does the same."""

import json
import shutil

import pytest

from dinokit.__main__ import main
from dinokit.features.store import open_store


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, weights, write_images):
    folder = tmp_path_factory.mktemp("extracted")
    pool = write_images(folder / "pool")
    assert (
        main(["extract", f"weights={weights}", f"data.path={pool}", f"out={folder / 'store'}", "workers=0"])
        == 0
    )
    return folder


@pytest.fixture
def store(tmp_path, extracted):
    return shutil.copytree(extracted / "store", tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": {"../../secret": {"shape": [4, 16], "dtype": "<f2"}}},
        {"tokens": {"cls": {"shape": [4, 16], "dtype": "O"}}},
        {"tokens": {"cls": {"shape": [4, 2], "dtype": "float16"}}},
        {"tokens": ["cls"]}, {"images": 10**13, "shard": 1}, {"images": -4}, {"images": 10**400},
        {"shard": 0}, {"data": 5}, {"files": "zip"},
    ],
    ids=str,
)  # fmt: skip
def test_a_store_with_other_values_is_refused_by_its_name(change, store):
    about = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(ValueError, match=str(store)):
        open_store(store)["cls"][:]


def test_a_damaged_shard_is_named(store):
    path = next((store / "cls").glob("*.npy"))
    for content in (path.read_bytes()[:-5], b"", b"\x80\x04]."):
        path.unlink()  # never in place: the older one may be mapped
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            open_store(store)["cls"][:]


def test_a_store_that_names_a_data_set_of_the_hub_downloads_nothing(store, extracted, capsys):
    about = json.loads((store / "store.json").read_text())
    about["data"] = {"name": "hf", "path": "evil/pixels"}
    (store / "store.json").write_text(json.dumps(about))
    assert main(["search", f"index={store}", f"{extracted}/pool/red/0.png", "k=2"]) != 0
    assert "would be downloaded" in capsys.readouterr().err
