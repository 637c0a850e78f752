"""A full disk: every command that writes ends with status 3, names the file and leaves no half of one."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.runtime.files import DiskFullError, aside, atomic, write_text
from dinokit.weights import save_backbone

VIT = {"name": "vit", "width": 32, "depth": 1, "heads": 1, "size": 16, "patch": 8}
SIZE = 1024  # KiB of the disk


def room(disk: Path, kib: int) -> None:
    """Fill the disk up to so many KiB."""
    (disk / "filler").write_bytes(b"")
    (disk / "filler").write_bytes(bytes(1024 * (SIZE - kib)))


@pytest.fixture
def disk(tmp_path):
    """An empty disk of SIZE KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory, write_images):
    """Labelled images, weights of a vit, and a store of its features, on another disk."""
    tmp_path = tmp_path_factory.mktemp("material")
    for seed, split in enumerate(("train", "test")):
        write_images(tmp_path / split, [f"{number}.png" for number in range(4)], seed=seed)
    torch.manual_seed(0)
    save_backbone(tmp_path / "w.safetensors", registry.build("models", VIT), VIT)
    return tmp_path


def left(disk: Path) -> list[str]:
    """Names of the files on the disk but locks."""
    files = [p for p in disk.rglob("*") if p.is_file() and p.name not in ("filler", ".lock")]
    return sorted(str(p.relative_to(disk)) for p in files)


COMMANDS = {  # words, and the KiB that fit: with another number the command would end well, or at once
    "eval": ("eval knn k=2 weights=W train.path=TRAIN test.path=TEST cache=null out=DISK/out", 0),
    "cache": ("eval knn k=2 weights=W train.path=TRAIN test.path=TEST cache=DISK/cache", 4),
    "logreg": ("eval logreg weights=W powers=[0,0] count=1 train.path=TRAIN test.path=TEST out=DISK/out", 0),
    "extract": ("extract weights=W data.path=TRAIN out=DISK/store workers=0", 12),
    "parquet": ("extract weights=W data.path=TRAIN out=DISK/store format=parquet workers=0", 8),
    "viz": ("viz pca weights=W TRAIN out=DISK/a.png", 16),
    "dinov2": ("export weights=W to=dinov2 out=DISK/a.pth", 16),
    "timm": ("export weights=W to=timm out=DISK/a", 16),
    "hf": ("export weights=W to=hf out=DISK/a", 16),
    "curate": ("curate curate_small pool.path=TRAIN weights=W embed.size=16 balance.images=4 out=DISK/c", 16),
    "predict": ("predict weights=W labelled.path=TRAIN k=2 data.path=TEST out=DISK/labels.csv", 0),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_file_that_does_not_fit(name, disk, material, capsys, monkeypatch, tmp_path):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    text, kib = COMMANDS[name]
    where = {"W": "w.safetensors", "TRAIN": "train", "TEST": "test"}
    places = {"DISK": disk, **{key: material / value for key, value in where.items()}}
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "cache"))
    words = [re.sub(r"\b(DISK|W|TRAIN|TEST)\b", lambda m: str(places[m[0]]), word) for word in text.split()]
    room(disk, kib)
    status = main(words)
    error = capsys.readouterr().err
    assert status == 3, error
    assert re.search(rf"{re.escape(str(disk))}/\S+ could not be written: the disk is full", error), error
    assert re.search(r"It needs (space|more than [\d,]+ bytes), and \S+ has room for [\d,]+\.", error), error
    for file in left(disk):  # what is complete may stay; nothing that was asked for is there
        assert not re.fullmatch(r"a(\..*|/.*)?|page\.html|labels\.csv|.*\.part", file), file
        assert file != "out/results.jsonl" or not (disk / file).read_bytes().endswith(b"\n")


def training(material, out, steps):
    """The words of a short training in the folder `out`."""
    small = {f"backbone.{key}": value for key, value in VIT.items()}
    small |= {"optim.steps": steps, "optim.batch": 2, "optim.warmup": 1, "heads.cls.prototypes": 8,
              "heads.cls.hidden": 8, "heads.cls.bottleneck": 4, "losses.ibot": "null", "masks": "null",
              "crops.globals.size": 16, "crops.locals.size": 8, "evals.knn": "null",
              "run.workers": 0, "run.log_every": 1, "run.report": "false"}  # fmt: skip
    words = [f"{key}={value}" for key, value in small.items()]
    return [
        "train",
        "small_photos",
        *words,
        f"data.path={material / 'train'}",
        f"run.out={out}",
        "run.device=cpu",
    ]


def test_the_records_of_a_run_name_their_disk(disk, material, capsys):
    """While it trains: metrics.jsonl or run.log, whichever needs the next page, then a checkpoint."""
    room(disk, 40)
    status = main(training(material, disk / "run", 400))
    error = capsys.readouterr().err
    assert status == 3, error
    assert re.search(rf"{disk}/run/(metrics.jsonl|run.log) could not be written: the disk is full", error)
    assert "No space left" not in error
    lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines[:-1]]  # the last may be cut, and is left out
    assert steps == sorted(steps)


@pytest.mark.slow
def test_a_report_names_its_disk(disk, material, capsys):
    assert main(training(material, material / "run", 2)) == 0
    room(disk, 40)
    assert main(["report", str(material / "run"), f"out={disk / 'page.html'}"]) == 3
    assert f"{disk}/page.html could not be written: the disk is full" in capsys.readouterr().err
    assert not (disk / "page.html").exists()


def test_an_older_file_stays_and_the_need_is_stated(disk):
    path = disk / "page.html"
    write_text(path, "old")
    room(disk, 8)
    with pytest.raises(DiskFullError, match=r"page\.html could .* more than 4,096 bytes.* room for 4,096"):
        write_text(path, "x" * 100_000)
    assert path.read_text() == "old"

    def write_model() -> None:
        with aside(disk / "model") as folder:
            (folder / "model").mkdir()
            (folder / "model" / "a").write_bytes(bytes(4000))
            (folder / "model" / "b").write_bytes(bytes(50_000))

    with pytest.raises(DiskFullError, match=r"/model could not be written: .* more than"):
        write_model()
    assert left(disk) == ["page.html"]


def test_a_library_that_forgets_the_reason_is_understood(disk):
    room(disk, 8)
    # Given a path, torch raises an error without that of the system.
    with pytest.raises(DiskFullError, match=r"a\.pth"), atomic(disk / "a.pth") as temporary:
        torch.save({"x": torch.zeros(10_000)}, temporary)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8))
    with pytest.raises(DiskFullError, match=r"a\.png"), atomic(disk / "a.png") as temporary:
        noise.save(temporary, "PNG")
