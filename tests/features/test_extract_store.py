"""Extractions that are killed, shared out, or out of room leave what an unbroken one leaves."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dinokit.__main__ import main
from dinokit.features.store_write import prepare_folder

# A shell's background jobs are born ignoring Ctrl-C.
COMMAND = """
import signal, sys
from dinokit.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
# Twenty images a second at most, so that a signal comes while there is something left to do.
SLOWLY = """
import time
from PIL import Image
quick = Image.open
Image.open = lambda *given, **more: (time.sleep(0.05), quick(*given, **more))[1]
"""
ALIKE = ["tokens=cls,patch", "fit=resize", "size=32", "shard=8", "batch=3", "workers=0", "precision=fp32"]


def words(weights: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return ["extract", f"weights={weights}", f"data.path={photos}", f"out={out}", *ALIKE, *more]


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "store.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def start(*arguments: str, before: str = "", **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def wait_for(process: subprocess.Popen, path: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if path.exists():
            return
        time.sleep(0.002)
    pytest.fail(f"{path} did not come: {process.communicate()}")


@pytest.fixture
def whole(vit_file, photos, tmp_path, capsys):
    """A folder of photos, and all files of an unbroken extraction."""
    folder = photos(160, 5, 77)
    assert main(words(vit_file, folder, tmp_path / "whole")) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["images"], last["unreadable"], last["cls"]) == (160, 2, [160, 24])
    return folder, contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_extraction_resumes_and_writes_the_same_bytes(whole, vit_file, tmp_path):
    folder, want = whole
    out = tmp_path / "broken"
    process = start(*words(vit_file, folder, out), before=SLOWLY)
    wait_for(process, out / "images" / "00003.npy")
    process.kill()
    process.communicate()
    assert not (out / "images" / "00019.npy").exists()  # it was killed on the way
    (out / "cls" / ".00009.npy.1.part").write_bytes(b"left half written")
    assert main(words(vit_file, folder, out)) == 0
    assert contents(out) == want


def test_parquet_names_the_unreadable_images_too(whole, vit_file, tmp_path, capsys):
    folder, want = whole
    assert main(words(vit_file, folder, tmp_path / "rows", "format=parquet")) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["images"], last["unreadable"]) == (160, 2)
    assert (tmp_path / "rows" / "unreadable.txt").read_bytes() == want["unreadable.txt"]


@pytest.mark.slow
def test_ctrl_c_stops_at_once_and_complete_shards_stay(whole, vit_file, tmp_path):
    folder, want = whole
    out = tmp_path / "broken"
    process = start(*words(vit_file, folder, out), before=SLOWLY)
    wait_for(process, out / "images" / "00001.npy")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err
    written = contents(out)
    assert not any("part" in name for name in written)
    assert all(written[name] == want[name] for name in written)


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(whole, vit_file, tmp_path, capsys):
    folder, want = whole
    assert main(words(vit_file, folder, tmp_path / "two", "processes=2")) == 0
    assert contents(tmp_path / "two") == want
    assert "0077.png cannot be read" in capsys.readouterr().out


def test_separate_parts_write_the_same_bytes(whole, vit_file, tmp_path, capsys):
    folder, want = whole
    out = tmp_path / "parts"
    assert main(words(vit_file, folder, out, "part=1/2")) == 0
    assert {int(path.stem) % 2 for path in (out / "cls").iterdir()} == {1}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["complete"] is False
    assert main(words(vit_file, folder, out, "part=0/2")) == 0
    assert contents(out) == want


def test_two_parts_that_start_together_share_the_folder(tmp_path, monkeypatch):
    """Between two looks at the folder the other one writes store.json."""
    out, about, names = tmp_path / "out", {"shard": 2}, ["a", "b"]
    out.mkdir()
    real = Path.iterdir

    def iterdir(path):
        monkeypatch.setattr(Path, "iterdir", real)
        prepare_folder(out, about, names, clean=False)
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    prepare_folder(out, about, names, clean=False)
    assert {path.name for path in out.iterdir()} == {"store.json", "names.txt"}


@pytest.mark.slow
def test_processes_of_a_launcher_share_the_shards(whole, vit_file, tmp_path):
    folder, want = whole
    out = tmp_path / "launched"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    second = start(*words(vit_file, folder, out), RANK="1", LOCAL_RANK="1", **place)
    _, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert {int(path.stem) % 2 for path in (out / "cls").iterdir()} == {1}
    first = start(*words(vit_file, folder, out), RANK="0", LOCAL_RANK="0", **place)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    assert contents(out) == want


def test_a_full_disk_is_reported_and_complete_shards_stay(vit_file, photos, tmp_path, capsys, monkeypatch):
    folder, out = photos(20), tmp_path / "out"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4000, old[1])
    )  # a file that must not grow: as a disk that is full
    try:
        status = main(words(vit_file, folder, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    err = capsys.readouterr().err
    assert status == 3
    assert "bytes. 0 of 3 shards are complete and stay. Free some space; the same command" in err
    assert main(words(vit_file, folder, out)) == 0


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("tokens=cls,ptch", "tokens: no 'ptch'. Did you mean 'patch'?"),
        ("fit=stretch", "fit: "),
        ("sise=3", "there is no key 'sise'. Did you mean 'size'?"),
        ("data.pth=x", "data.pth: there is no key 'pth' in 'data'. Did you mean 'path'"),
        ("batch=0", "batch=0, but it must be 1 or more"),
        ("part=2/2", "part=2/2: it is I/N, with I from 0 to N - 1"),
    ],
)
def test_a_wrong_setting_is_refused_without_importing_torch(change, answer):
    command = (
        "import sys; from dinokit.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit('torch' if 'torch' in sys.modules else status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", command, "extract", "weights=x", "out=y", "data.path=z", change],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert answer in result.stderr


def test_a_setting_that_cannot_be_met_is_wrong_usage_and_leaves_no_folder(vit_file, photos, tmp_path, capsys):
    folder, out = photos(2), tmp_path / "out"
    for setting, answer in {
        "layers=last9": "the backbone has 3 blocks",
        "size=33": "size=33 is not a multiple of the backbone's patch",
        "device=cuda:99": "There is no device cuda:99 here",
        f"out={folder / 'features'}": "is inside data.path=",
    }.items():
        if setting.startswith("device") and torch.cuda.is_available():
            continue
        words = [f"weights={vit_file}", f"data.path={folder}", f"out={out}", "workers=0", setting]
        assert main(["extract", *words]) == 2
        assert answer in capsys.readouterr().err
        assert not out.exists()
        assert not (folder / "features").exists()


def test_an_empty_folder_is_refused(vit_file, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert main(words(vit_file, tmp_path / "none", tmp_path / "out")) == 3
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_json_is_printed_once_and_the_rest_on_standard_error(vit_file, photos, tmp_path, capsys):
    given = words(vit_file, photos(9), tmp_path / "out")
    assert main([*given, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert json.loads(shown.out)["images"] == 9
    assert "9 images, out=" in shown.err
    assert [line for line in shown.err.splitlines() if line.startswith("{")] == []
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 9


def test_an_evaluation_prints_its_scores_once_too(vit_file, tmp_path, capsys):
    sources = [
        f"{part}.{key}"
        for part in ("train", "test")
        for key in ("name=scenes", f"split={part}", "count=12", "test_count=12")
    ]
    given = [
        "eval",
        "knn",
        f"weights={vit_file}",
        *sources,
        "k=1",
        "workers=0",
        f"out={tmp_path}",
        "device=cpu",
    ]
    assert main([*given, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert "top1" in shown.out
    assert [line for line in shown.err.splitlines() if line.startswith("{")] == []
