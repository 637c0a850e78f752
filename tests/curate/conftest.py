"""Photos with planted duplicates, a small backbone, and a function that curates as a user does."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.data.sources.scenes import Config, build
from dinokit.models import Input
from dinokit.weights import save_backbone

SECTION = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8, "layer_scale": 1.0}


@pytest.fixture(scope="session")
def scenes():
    source = build(Config(count=60, size=128))
    return [source[i][0] for i in range(60)]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    backbone = registry.build("models", SECTION)
    backbone.input = Input(32, (0.5,) * 3, (0.25,) * 3)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_backbone(path, backbone, SECTION)
    return path


@pytest.fixture
def curate(capsys):
    def run(*words, fails=False):
        """Run a command line; returns its last line, or its error message."""
        status = main(["curate", "curate_small", "embed.workers=0", *words])
        output = capsys.readouterr()
        assert status in ((2, 3) if fails else (0,)), output.err
        return output.err if fails else json.loads(output.out.splitlines()[-1])

    return run


@pytest.fixture
def photos(scenes, tmp_path):
    """40 photos with duplicates, whose names say how they were made; 8 photos are also in a test set."""

    def save(image, folder, name, **how):
        (tmp_path / folder).mkdir(exist_ok=True)
        image.save(tmp_path / folder / name, **how)

    for number, photo in enumerate(scenes[:40]):
        photo = photo.convert("RGB")
        save(photo, "pool", f"{number:02d}.png")
        if number % 2 == 0:
            save(photo, "pool", f"{number:02d}_exact.png", compress_level=1)
        if number % 4 < 2:
            save(photo, "pool", f"{number:02d}_jpeg.jpg", quality=70)
        if number % 8 < 3:
            half = photo.resize((64, 64), Image.Resampling.BICUBIC)
            save(half, "pool", f"{number:02d}_half.png")
        if number >= 32:
            save(photo, "test", f"{number:02d}.jpg", quality=85)
    for number, photo in enumerate(scenes[40:50]):
        save(photo.convert("RGB"), "seeds", f"{number:02d}.png")
    (tmp_path / "pool" / "broken.jpg").write_bytes(b"not an image")
    return tmp_path


@pytest.fixture(scope="session")
def make():
    """synthetic.py's make(): vectors with a known truth."""
    return runpy.run_path(str(Path(__file__).with_name("synthetic.py")))["make"]
