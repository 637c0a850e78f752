"""Features from disk: the same as made anew, and never those of other weights, images or settings."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.data.sources import images_stamp
from dinokit.eval._images import image_features
from dinokit.eval.knn import Config
from dinokit.features import Features, Pooling, cached, fingerprint, load_cached, spread
from dinokit.models import Backbone

CPU = torch.device("cpu")
VIT = {"name": "vit", "width": 24, "depth": 4, "heads": 2, "patch": 8, "size": 16, "layer_scale": 1.0}


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i, 0, 100)).save(path)
    return tmp_path / "images"


def opened(folder, **values):
    section = {"name": "folder", "path": str(folder), "labels": "folders", **values}
    return registry.build("data.sources", section)


def vit(**values):
    torch.manual_seed(0)
    return registry.build("models", {**VIT, **values}).eval()


class Watched(Backbone):
    """Counts how often a backbone is asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.width, self.patch, self.channels = net, net.width, net.patch, net.channels
        self.blocks, self.input, self.calls = net.blocks, net.input, []

    def forward(self, crops, masks):
        self.calls.append(len(crops[0]))
        return self.net(crops, masks)

    def layers(self, crops, blocks, norm=True):
        self.calls.append(len(crops))
        return self.net.layers(crops, blocks, norm)


def asked(tmp_path, net, source, reading=Pooling(), **values):  # noqa: B008
    watched = Watched(net)
    cfg = Config(cache=str(tmp_path / "cache"), workers=0, **values)
    features = image_features(cfg, "train", watched, source, reading)
    return features, sum(watched.calls)


def test_cached_features_are_equal_to_computed_ones(tmp_path, folder):
    first, made = asked(tmp_path, vit(), opened(folder))
    second, again = asked(tmp_path, vit(), opened(folder))
    assert (made, again) == (6, 0)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)
    assert second.unreadable == []


KILLED = """
import os, signal, sys
import torch
from dinokit.config import registry
from dinokit.eval._images import image_features
from dinokit.eval.knn import Config
from dinokit.features import Pooling
torch.set_num_threads(1)
sys.modules["dinokit.features.extract"].SAVE_SECONDS = 0.0
images, cache, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
shape = {"name": "vit", "width": 24, "depth": 4, "heads": 2, "patch": 8, "size": 16}
net = registry.build("models", shape).eval()
calls = 0
def count(*_):
    global calls
    calls += 1
    if calls == stop:
        os.kill(os.getpid(), signal.SIGKILL)
net.register_forward_pre_hook(count)
source = registry.build("data.sources", {"name": "folder", "path": images, "labels": "folders"})
cfg = Config(cache=cache, workers=0, batch=2, max_unreadable=1.0)
features = image_features(cfg, "train", net, source, Pooling())
torch.save({"x": features.x, "y": features.y, "lost": features.unreadable, "calls": calls}, cache + ".pt")
"""


@pytest.mark.slow
def test_extraction_resumes_after_the_process_was_killed(tmp_path, folder):
    for i in range(6, 12):
        Image.new("RGB", (20, 20), (0, 20 * i, 100)).save(folder / "ab"[i % 2] / f"{i}.png")
    (folder / "a" / "2.png").write_bytes(b"")

    def go(out, stop):
        words = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / out), str(stop)]
        features = subprocess.run(words, capture_output=True, text=True)
        return features, torch.load(tmp_path / f"{out}.pt") if (tmp_path / f"{out}.pt").exists() else None

    assert go("cut", stop=4)[0].returncode == -9
    parts = sorted((tmp_path / "cut").iterdir())
    assert len(parts) == 3
    parts[2].write_bytes(parts[2].read_bytes()[:-1])  # cut short: its rows are computed again
    rest, found = go("cut", stop=0)
    whole, want = go("whole", stop=0)
    assert found is not None, rest.stderr
    assert want is not None, whole.stderr
    assert (want["calls"], found["calls"]) == (6, 4)
    assert torch.equal(found["x"], want["x"])
    assert torch.equal(found["y"], want["y"])
    assert found["lost"] == want["lost"] == [str(folder / "a" / "2.png")]
    assert len(list((tmp_path / "cut").iterdir())) == 1  # the entry


def test_the_names_of_unreadable_images_are_cached(tmp_path, folder):
    (folder / "a" / "0.png").write_bytes(b"")
    for _ in range(2):
        features, _ = asked(tmp_path, vit(), opened(folder), max_unreadable=0.5)
        assert features.unreadable == [str(folder / "a" / "0.png")]
        assert len(features.x) == 5


def change_a_pixel(folder):
    path = folder / "a" / "0.png"
    Image.new("RGB", (20, 20), (1, 2, 3)).save(path)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # a coarse clock may not have ticked


@pytest.mark.parametrize(
    "change",
    [
        change_a_pixel,
        lambda folder: (folder / "a" / "0.png").rename(folder / "a" / "z.png"),
        lambda folder: (folder / "a" / "0.png").rename(folder / "b" / "0.png"),
        lambda folder: (folder / "a" / "0.png").unlink(),
        lambda folder: (folder / "a").rename(folder / "c"),
    ],
)
def test_changed_images_are_computed_again(tmp_path, folder, change):
    asked(tmp_path, vit(), opened(folder))
    change(folder)
    assert asked(tmp_path, vit(), opened(folder))[1] > 0


@pytest.mark.parametrize(
    "values", [{"size": 8}, {"resize": 40}, {"precision": "bf16"}, {"reading": Pooling(2, "mean")}]
)
def test_another_view_precision_or_pooling_is_computed_again(tmp_path, folder, values):
    asked(tmp_path, vit(), opened(folder), precision="fp32")
    assert asked(tmp_path, vit(), opened(folder), **{"precision": "fp32", **values})[1] == 6


def test_a_subset_has_its_own_entry(tmp_path, folder):
    asked(tmp_path, vit(), opened(folder))
    assert asked(tmp_path, vit(), spread(opened(folder), 3))[1] == 3


def full(backbone):
    return fingerprint(backbone, settings=True)


def test_fingerprints_differ_for_other_weights_and_with_settings_for_other_settings():
    a, b = vit(), vit()
    assert full(a) == full(b)
    assert full(a) == full(b.train())
    assert full(vit(heads=4)) != full(a)
    assert fingerprint(vit(heads=4)) == fingerprint(a)
    with torch.no_grad():
        b.blocks[3].mlp.fc2.bias[0] += 1e-7
    assert full(b) != full(a)
    c = vit()
    c.register_buffer("middle", torch.zeros(3), persistent=False)
    before = full(c)
    c.middle += 1
    assert full(c) != before  # in no file of weights, and yet what it says depends on it


def test_the_class_token_is_taken_from_the_cached_linear_grid(tmp_path, folder):
    asked(tmp_path, vit(), opened(folder), Pooling(4, "mean"))
    features, again = asked(tmp_path, vit(), opened(folder))
    assert again == 0
    direct, _ = asked(tmp_path / "elsewhere", vit(), opened(folder))
    torch.testing.assert_close(features.x, direct.x)


class Silent:
    """Images that do not say when they change."""

    classes = ("a", "b")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Image.new("RGB", (20, 20), (index, 0, 0)), index % 2


def test_a_source_without_a_stamp_is_never_cached(tmp_path):
    assert images_stamp(Silent()) is None
    assert [asked(tmp_path, vit(), Silent())[1] for _ in range(2)] == [3, 3]
    assert not (tmp_path / "cache").exists()


X = torch.arange(6.0).numpy().tobytes()  # as the features of entry() are stored


def entry(tmp_path, name="a", rows=3):
    def make(partial):
        return Features(torch.arange(rows * 2.0).view(rows, 2), torch.arange(rows), ["lost"])

    return cached(tmp_path, name, CPU, make)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b.replace(X, X[:-1] + bytes([X[-1] ^ 1])), lambda b: b""],
)
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    entry(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert load_cached(tmp_path, "a", CPU) is None
    assert entry(tmp_path).x.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert load_cached(tmp_path, "a", CPU).x.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_above_the_limit_the_longest_unused_entries_are_deleted(tmp_path, monkeypatch):
    for number, name in enumerate("abc"):
        entry(tmp_path, name, rows=1000)
        for file in tmp_path.iterdir():
            if file.stat().st_mtime > 1000:
                os.utime(file, (number, number))
    entry(tmp_path, "a", rows=1000)  # used just now
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(sys.modules["dinokit.features.extract"], "LIMIT", 2 * size + 10)
    entry(tmp_path, "d", rows=1000)
    assert [name for name in "abcd" if load_cached(tmp_path, name, CPU)] == ["a", "d"]


def test_what_another_process_writes_or_deletes_meanwhile_does_no_harm(tmp_path, monkeypatch):
    module = sys.modules["dinokit.features.extract"]
    monkeypatch.setattr(module, "LIMIT", 10)
    living, dead, moved = (tmp_path / f".{name}.host.1.part" for name in ("living", "dead", "moved"))
    for file in (living, dead):
        file.write_bytes(bytes(100))
    os.utime(dead, (1, 1))
    moved.symlink_to("moved away")  # as a file that vanishes after the folder was read
    entry(tmp_path, "a")
    assert living.exists()
    assert not dead.exists()
    assert load_cached(tmp_path, "a", CPU) is not None


@pytest.mark.parametrize("name", ["scenes"])
def test_built_in_scenes_have_a_stamp_of_their_settings(name):
    a, b, c = (registry.build("data.sources", {"name": name, "count": 5, "seed": seed}) for seed in (0, 0, 1))
    assert images_stamp(a) == images_stamp(b) != images_stamp(c)
