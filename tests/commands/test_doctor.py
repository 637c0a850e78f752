"""`dinokit doctor`: each finding is provoked by real files, through the program."""

import json

import numpy as np
import pytest
from PIL import Image

from dinokit.__main__ import main
from dinokit.commands import doctor


def photo(seed: int, side: int = 96) -> Image.Image:
    """Random colours in patches of some pixels, which survive JPEG, so that near duplicates are near."""
    small = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        photo(seed, 96 + 64 * (seed % 2)).save(folder / f"{seed}.png")
    return folder


def diagnose(capsys, *words: str) -> tuple[int, dict]:
    status = main(["doctor", *map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def names(report: dict) -> set[str]:
    return {each["name"] for each in report["findings"]} - {"GPU"}


def test_sound_images_have_no_findings_and_right_facts(photos, capsys):
    status, report = diagnose(capsys, photos)
    data = report["data"][str(photos)]
    pixels = [np.asarray(Image.open(file)) / 255 for file in sorted(photos.iterdir())]
    assert (status, names(report)) == (0, set())
    assert (data["images"], data["read"], data["formats"]) == (6, 6, {"PNG": 6})
    assert data["modes"] == {"3 x 8 bit": 6}
    assert data["histogram"] == [["64 to 127", 3], ["128 to 255", 3]]
    np.testing.assert_allclose(data["mean"], np.mean([x.mean((0, 1)) for x in pixels], axis=0), atol=0.01)


def test_an_unreadable_image_is_named_and_fails_with_the_status_of_data(photos, capsys):
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    status, report = diagnose(capsys, photos)
    assert status == report["status"] == 3
    [finding] = report["findings"]
    assert finding["name"] == "unreadable"
    assert finding["problem"]
    assert "1 of 7" in finding["text"]
    assert "cut.png" in finding["text"]


def test_exact_and_near_duplicates_are_told_apart(photos, capsys):
    photo(0).save(photos / "same.png")
    photo(1, 160).save(photos / "again.jpg", quality=80)
    status, report = diagnose(capsys, photos)
    data = report["data"][str(photos)]
    assert status == 0
    assert names(report) == {"exact duplicates", "near duplicates"}
    assert [[name.rsplit("/")[-1] for name in pair] for pair in data["exact"]] == [["same.png", "0.png"]]
    assert {name.rsplit("/")[-1] for pair in data["near"] for name in pair} == {"1.png", "again.jpg"}


def test_turned_small_and_deep_images_are_counted(photos, capsys):
    exif = Image.Exif()
    exif[274] = 6
    photo(10).save(photos / "phone.jpg", exif=exif)
    photo(11, 40).save(photos / "small.png")
    deep = np.asarray(photo(12).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(photos / "deep.png")
    photo(13).convert("P").save(photos / "palette.png")
    status, report = diagnose(capsys, photos)
    assert (status, names(report)) == (0, {"orientation", "small", "mixed"})
    assert report["data"][str(photos)]["turned"] == 1
    assert report["data"][str(photos)]["modes"] == {"3 x 8 bit": 8, "1 x 16 bit": 1, "palette": 1}


def test_grey_images_are_seen(tmp_path, capsys):
    for seed in range(3):
        photo(seed).convert("L").save(tmp_path / f"{seed}.png")
    assert names(diagnose(capsys, tmp_path)[1]) == {"grey"}


def test_the_sample_is_spread_over_the_images(photos, capsys):
    (photos / "zz.png").write_bytes(b"no image")
    status, report = diagnose(capsys, photos, "sample=2")
    assert report["data"][str(photos)]["read"] == 2
    assert status == 3  # the last of the images is in the sample


def test_a_full_disk_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e9)  # no disk has so much
    status, report = diagnose(capsys)
    assert (status, names(report)) == (3, {"disk"})


def test_a_missing_package_is_named_with_what_it_adds(monkeypatch, capsys):
    monkeypatch.setitem(doctor.EXTRAS, "none_such", ("none-such", "pip install none-such", "nothing"))
    assert "pip install none-such" in diagnose(capsys)[1]["missing"]["none_such"]
    assert "transformers" not in doctor.packages()  # the tests have it


def test_without_json_it_is_read_by_people(photos, capsys):
    assert main(["doctor", str(photos)]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "64 to 127     ######" in out
    assert "No problem was found." in out
