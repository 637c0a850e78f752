"""Training images that somebody put among the test images, in disguise."""

import os
import shutil
import subprocess
import tarfile

import pytest

from dinokit.config import registry
from dinokit.data.sources import shared_images


def copies(kind, train, place):
    """A source of the images below `train`, made as somebody would who wants a high score."""
    if kind == "symlinks of folders":
        place.symlink_to(train)
    elif kind in ("hard links", "other capitals", "symlinks of files"):
        for file in sorted(train.rglob("*.png")):
            name = file.name.upper() if kind == "other capitals" else f"new_{file.name}"
            (place / file.parent.name).mkdir(parents=True, exist_ok=True)
            target = place / file.parent.name / name
            {"hard links": os.link, "symlinks of files": os.symlink}.get(kind, shutil.copy)(file, target)
    elif kind == "bind mount":
        place.mkdir()
        if subprocess.run(["mount", "--bind", train, place], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    elif kind == "tar":
        with tarfile.open(place.with_suffix(".tar"), "w") as file:
            file.add(train, "other")
        return {"name": "tar", "path": f"{place}.tar"}
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [{"bytes": file.read_bytes(), "path": "x"} for file in sorted(train.rglob("*.png"))]
        pq.write_table(pa.table({"image": rows, "label": ["a", "b", "a", "b"]}), f"{place}.parquet")
        return {"name": "parquet", "path": f"{place}.parquet"}
    return {"name": "folder", "path": str(place)}


KINDS = (
    "hard links",
    "symlinks of files",
    "symlinks of folders",
    "other capitals",
    "bind mount",
    "tar",
    "parquet",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_image_is_found_among_the_test_images_in_any_disguise(kind, tmp_path, write_images):
    train, place = write_images(tmp_path / "train"), tmp_path / "test"
    section = copies(kind, train, place)
    try:
        source = registry.build("data.sources", section)
        assert len(source) == 4
        assert shared_images(registry.build("data.sources", {"name": "folder", "path": str(train)}), source)
    finally:
        if kind == "bind mount":
            subprocess.run(["umount", str(place)], check=False)
