"""`dinokit doctor`: each finding is provoked by real files, through the program."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinokit.__main__ import main
from dinokit.commands import doctor
from dinokit.data.scan import findings, scan


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


class Floats:
    """Images of another package: arrays of floats, of which the last one has a NaN."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        pixels = np.full((200, 200, 3), 0.5, np.float32)
        pixels[101, 101, 1] = np.nan if index == 2 else index  # of most facts, few places are enough
        return pixels, -1

    def name(self, index):
        return f"image {index}"


def test_a_single_pixel_that_is_not_finite_is_found_wherever_it_is():
    found = scan(Floats())
    assert (found.read, found.not_finite) == (3, ["image 2"])
    [finding] = [each for each in findings(found) if each.name == "not finite"]
    assert finding.problem


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


# A namespace of mounts shows a process another machine, and nobody else sees it.
NAMESPACE = ["unshare", "--mount"] if os.name == "posix" and os.geteuid() == 0 else ["unshare", "-Urm"]


def on_another_machine(mounts: str, *words: str) -> tuple[int, dict]:
    """Run the command after these lines of a shell, which mount file systems for it alone."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, of util-linux")
    probe = subprocess.run([*NAMESPACE, "sh", "-ec", mounts], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this sandbox mounts nothing: {probe.stderr.strip()}")
    command = f'{mounts}\nexec "$0" -m dinokit doctor "$@" --json'
    done = subprocess.run(
        [*NAMESPACE, "sh", "-ec", command, sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def driver_of_nvidia(folder) -> str:
    (folder / "driver" / "nvidia").mkdir(parents=True)
    (folder / "driver" / "nvidia" / "version").write_text("NVRM version: NVIDIA Kernel Module 550.1\n")
    return f"mount --bind {folder}/driver /proc/driver"


def test_little_shared_memory_a_full_disk_a_folder_for_reading_and_a_broken_driver_are_found(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    small = "mount -t tmpfs -o size=1m tmpfs"
    mounts = [f"{small} /dev/shm", f"{small} {out}", f"mount -o remount,ro {out}", driver_of_nvidia(tmp_path)]
    status, report = on_another_machine("\n".join(mounts), f"out={out}/run")
    texts = {each["name"]: each["text"] for each in report["findings"]}
    problems = {each["name"] for each in report["findings"] if each["problem"]}
    assert status == 3
    assert problems == {"disk", "shared memory", "out"}
    assert "Read-only file system" in texts["out"]
    assert "run.workers=0" in texts["shared memory"]
    assert f"0.0 GiB are free for {out}/run" in texts["disk"]
    assert "docker run --gpus all" in texts["GPU"] or "built without CUDA" in texts["GPU"]
    assert "550.1" in report["machine"]["driver"]


def test_a_gpu_without_a_driver_is_a_note(tmp_path):
    device = tmp_path / "devices" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    (tmp_path / "driver").mkdir()
    mounts = (
        f"mount --bind {tmp_path}/driver /proc/driver\nmount --bind {tmp_path}/devices /sys/bus/pci/devices"
    )
    status, report = on_another_machine(mounts, f"out={tmp_path}")
    (finding,) = report["findings"]
    assert (status, finding["name"], finding["problem"]) == (0, "GPU", False)
    assert "no driver for it" in finding["text"]


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
