"""A good file with one change is read, or refused by an error that names the file."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dinokit.config.load import load_recipe
from dinokit.data.decode import decode
from dinokit.data.sources import manifest, parquet, tar
from dinokit.weights.checkpoint import open_checkpoint, write_tensors
from slurm.profile import load_profile

EXAMPLES = int(os.environ.get("DINOKIT_FUZZ", "15"))
REFUSED = (ValueError, LookupError, OSError)


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 16), 60).convert("RGB").save(file, kind)
    return file.getvalue()


def write_recipe(path: Path) -> None:
    path.write_text(
        "data: {name: folder, path: images}\nbackbone: {name: vit}\n"
        "optim: {lr: 0.001, batch: 8, steps: 10}\n"
        "losses: {dino: {}}\nrun: {out: runs/x}\n"
    )


def write_profile(path: Path) -> None:
    path.write_text("partition: gpu\nhours: 6\n")


def write_manifest(path: Path) -> None:
    for name in "abc":
        (path.parent / f"{name}.png").write_bytes(picture("PNG"))
    path.write_text("path,label,split\na.png,emu,train\nb.png,ant,test\nc.png,emu,train\n")


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in "abc":
            info = tarfile.TarInfo(f"{name}.png")
            data = picture("PNG")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def write_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": picture("PNG"), "path": f"{n}.png"} for n in range(4)]
    meta = {"dinokit": json.dumps({"classes": ["ant", "emu"]})}
    table = pa.table({"image": images, "label": [0, 1, 0, 1]}).replace_schema_metadata(meta)
    pq.write_table(table, path, row_group_size=2)


def write_safetensors(path: Path) -> None:
    write_tensors(path, {"a.weight": torch.rand(4, 3), "b": torch.rand(5)}, {"note": "x"})


def write_pickle(path: Path) -> None:
    torch.save({"teacher": {"a.weight": torch.rand(4, 3)}, "epoch": 3}, path)


def read_source(module: Any) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        source = module.build(module.Config(path=str(path)))
        return [(source.stored(n), source.name(n)) for n in range(len(source))]

    return read


READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "recipe.yaml": (write_recipe, load_recipe),
    "profile.yaml": (write_profile, lambda path: load_profile(str(path), {})),
    "list.csv": (write_manifest, read_source(manifest)),
    "shard.tar": (write_tar, read_source(tar)),
    "rows.parquet": (write_parquet, read_source(parquet)),
    "model.safetensors": (write_safetensors, open_checkpoint),
    "model.pth": (write_pickle, open_checkpoint),
} | {
    f"image.{kind}": (
        lambda path, kind=kind: path.write_bytes(picture(kind)),
        lambda path: decode(path.read_bytes(), str(path), 3),
    )
    for kind in ("png", "jpeg", "tiff", "webp")
}


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One change: a flipped bit, a cut, bytes put in, a doubled piece, or zeros."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero"]))
    start, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 64))
    bit, extra = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=16))

    def change(data: bytes) -> bytes:
        a = int(start * len(data))
        b = min(a + size, len(data))
        return {
            "flip": data[:a] + bytes([data[a] ^ 1 << bit]) + data[a + 1 :],
            "cut": data[:a],
            "insert": data[:a] + extra + data[a:],
            "double": data[:b] + data[a:],
            "zero": data[:a] + bytes(b - a) + data[b:],
        }[kind]

    return change


@pytest.mark.parametrize("name", READERS)
def test_a_file_with_one_change_is_read_or_refused_by_its_name(tmp_path: Path, name: str) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    good = path.read_bytes()
    read(path)  # the file is good before it is changed

    @settings(
        max_examples=EXAMPLES, deadline=10_000, database=None, derandomize=EXAMPLES == 15,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changes())
    def check(change: Callable[[bytes], bytes]) -> None:
        path.unlink(missing_ok=True)  # never in place: an older example may still be mapped
        path.write_bytes(change(good))
        try:
            read(path)
        except REFUSED as error:
            message = str(error)
        else:
            return
        # A recipe may be changed by overrides, so its errors name the key.
        assert name == "recipe.yaml" or str(tmp_path) in message, message

    check()
