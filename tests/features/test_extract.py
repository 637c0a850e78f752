"""Frozen features against one image at a time, computed by hand."""

import contextlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinokit.features import extract, frozen, spread
from dinokit.models import Backbone, Input, Tokens
from dinokit.runtime.partial import PartialResult


class Squares:
    """Images of 8 x 8 pixels in plain colours, made from their number; some cannot be read."""

    def __init__(self, n=23, lost=(), channels=3, labelled=True):
        self.n, self.lost, self.channels = n, set(lost), channels
        self.classes = ["a", "b", "c"] if labelled else []

    def __len__(self):
        return self.n

    def colour(self, index):
        return np.array([index * 10, 255 - index, index % 3][: self.channels], np.uint8)

    def __getitem__(self, index):
        if index in self.lost:
            raise OSError(f"{self.name(index)} is damaged")
        pixels = np.tile(self.colour(index), (8, 8, 1))
        image = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
        return image, index % 3 if self.classes else -1

    def name(self, index):
        return f"square-{index}"


class Linear(Backbone):
    """A linear map of the mean colour, with dropout and batch norm, which tell train from eval mode."""

    def __init__(self, channels=3):
        super().__init__()
        self.width, self.patch, self.channels, self.blocks = 5, 4, channels, nn.ModuleList()
        self.input = Input(8, (0.2, 0.3, 0.4)[:channels], (0.5, 0.6, 0.7)[:channels])
        self.map = nn.Linear(channels, self.width)
        self.norm = nn.BatchNorm1d(self.width)
        self.drop = nn.Dropout(0.5)

    def forward(self, crops, masks):
        assert masks == [None] * len(crops)
        features = []
        for x in crops:
            cls = self.drop(self.norm(self.map(x.mean(dim=(2, 3)))))
            features.append(Tokens(cls, cls[:, None][:, :0], cls[:, None]))
        return features


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    net = Linear()
    net.norm.running_mean.fill_(0.3)
    return net


def by_hand(net, source, index):
    """The definition in float64, for one image."""
    c = source.colour(index) / 255
    x = (c - np.array(net.input.mean)) / np.array(net.input.std)
    weight, bias = (p.detach().double().numpy() for p in (net.map.weight, net.map.bias))
    mean, var = (b.double().numpy() for b in (net.norm.running_mean, net.norm.running_var))
    return (weight @ x + bias - mean) / np.sqrt(var + net.norm.eps)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_a_row_is_the_output_of_the_backbone_for_that_image(backbone, batch):
    source = Squares()
    features = extract(backbone, source, 8, 8, batch)
    assert features.x.dtype == torch.float32
    assert features.y.tolist() == [i % 3 for i in range(23)]
    assert features.unreadable == []
    for i, row in enumerate(features.x.double().numpy()):
        np.testing.assert_allclose(row, by_hand(backbone, source, i), atol=1e-5)


def test_unreadable_images_are_left_out_and_named(backbone):
    source = Squares(lost=(0, 4, 5, 6, 7, 22))
    features = extract(backbone, source, 8, 8, batch=4)  # one batch is lost as a whole
    readable = [i for i in range(23) if i not in source.lost]
    assert features.unreadable == [f"square-{i}" for i in sorted(source.lost)]
    assert features.y.tolist() == [i % 3 for i in readable]
    whole = extract(backbone, Squares(), 8, 8).x
    torch.testing.assert_close(features.x, whole[readable])


def test_black_images_without_labels_are_not_taken_for_unreadable_ones(backbone):
    class Black(Squares):
        def colour(self, index):
            return np.zeros(3, np.uint8)

    features = extract(backbone, Black(n=6, lost=(2,), labelled=False), 8, 8)
    assert features.unreadable == ["square-2"]
    assert features.y.tolist() == [-1] * 5


def test_extraction_does_not_change_the_backbone(backbone):
    backbone.train()
    backbone.norm.eval()
    backbone.map.requires_grad_(False)
    modes = [m.training for m in backbone.modules()]
    requires_grad = [p.requires_grad for p in backbone.parameters()]
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract(backbone, Squares(), 8, 8)
    assert [m.training for m in backbone.modules()] == modes
    assert [p.requires_grad for p in backbone.parameters()] == requires_grad
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_the_mode_is_restored_after_an_error(backbone):
    backbone.train()
    with contextlib.suppress(KeyError), frozen(backbone):
        assert not backbone.drop.training
        raise KeyError
    assert backbone.drop.training


def test_extraction_uses_no_random_numbers_of_training(backbone):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    extract(backbone.train(), Squares(), 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_pieces_of_two_commands_in_one_folder_leave_no_image_out(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["dinokit.features.extract"], "SAVE_SECONDS", 0.0)
    source = Squares(n=9)
    for name, batch in (("two", 2), ("four", 4)):
        extract(backbone, source, 8, 8, batch, partial=PartialResult(tmp_path / name, "features", "same"))
    (four,) = (tmp_path / "four").glob("*.1.pt")  # images 4 to 7; piece 0 of the other command ends with 1
    four.replace(tmp_path / "two" / four.name)
    partial = PartialResult(tmp_path / "two", "features", "same")
    features = extract(backbone, source, 8, 8, batch=2, partial=partial)
    assert features.unreadable == []
    torch.testing.assert_close(features.x, extract(backbone, source, 8, 8).x)


def test_something_can_be_trained_on_the_features(backbone):
    features = extract(backbone, Squares(), 8, 8)
    probe = nn.Linear(5, 3)
    nn.functional.cross_entropy(probe(features.x), features.y).backward()
    assert probe.weight.grad.abs().sum() > 0


def test_half_precision_is_used_inside_and_float32_comes_out(backbone):
    exact = extract(backbone, Squares(), 8, 8).x
    rounded = extract(backbone, Squares(), 8, 8, precision=torch.bfloat16).x
    assert rounded.dtype == torch.float32
    assert 1e-5 < (exact - rounded).abs().max() < 0.05


def test_float_images_in_0_1_and_bytes_give_the_same_features(backbone):
    class Floats(Squares):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return np.asarray(image, np.float32) / 255, label

    torch.testing.assert_close(extract(backbone, Floats(), 8, 8).x, extract(backbone, Squares(), 8, 8).x)


def test_the_resize_comes_before_the_crop(backbone):
    class Rims(Squares):
        def __getitem__(self, index):
            pixels = np.full((16, 16, 3), 255, np.uint8)
            pixels[4:12, 4:12] = self.colour(index)
            return Image.fromarray(pixels), index % 3

    torch.testing.assert_close(extract(backbone, Rims(), 16, 8).x, extract(backbone, Squares(), 8, 8).x)


def test_grey_images_need_a_grey_backbone(backbone):
    with pytest.raises(ValueError, match="The images have 1 channels, but the backbone takes 3"):
        extract(backbone, Squares(channels=1), 8, 8)
    assert extract(Linear(channels=1), Squares(channels=1, lost=(3,)), 8, 8).x.shape == (22, 5)


@pytest.mark.parametrize(
    ("resize", "size", "words"), [(9, 6, "multiple of the backbone's patch, 4"), (4, 8, "no crop")]
)
def test_sizes_that_do_not_fit_are_refused_before_an_image_is_read(backbone, resize, size, words):
    with pytest.raises(ValueError, match=words):
        extract(backbone, Squares(lost=range(23)), resize, size)


def test_a_source_without_readable_images_is_refused_with_the_reason(backbone):
    with pytest.raises(ValueError, match="None of the 5 images can be read: square-0 is damaged"):
        extract(backbone, Squares(n=5, lost=range(5)), 8, 8)


def test_features_that_are_not_finite_are_refused(backbone):
    with torch.no_grad():
        backbone.map.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Features of 23 of 23 images are not finite"):
        extract(backbone, Squares(), 8, 8)


@pytest.mark.parametrize("order", ["in turn", "in blocks"])
def test_spread_selects_classes_about_equally_in_any_order(order):
    class Labels(Squares):
        def __getitem__(self, index):
            return None, index % 10 if order == "in turn" else index * 10 // self.n

    subset = spread(Labels(n=10_000), 1000)
    counts = Counter(subset[i][1] for i in range(len(subset)))
    assert len(subset) == 1000
    assert subset.indices == sorted(set(subset.indices))
    assert subset.name(7) == f"square-{subset.indices[7]}"
    assert len(counts) == 10
    assert all(60 <= n <= 140 for n in counts.values())
    assert spread(Labels(n=10_000), 1000).indices == subset.indices


@pytest.mark.parametrize("count", [0, 23, 24])
def test_spread_over_all_images_is_the_source(count):
    assert spread(source := Squares(), count) is source


WORKER = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_extract import Linear, Squares
from dinokit.features import extract
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
features = extract(Linear(), Squares(n=9, lost=(3, 4)), 8, 8, batch=2)
print(json.dumps([features.x.tolist(), features.y.tolist(), features.unreadable]))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_get_the_features_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        str(tmp_path / "worker.py"),
        str(Path(__file__).parent),
        str(tmp_path / "meet"),
    ]
    runs = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    results = [json.loads(run.communicate(timeout=300)[0]) for run in runs]
    torch.manual_seed(0)
    single = extract(Linear(), Squares(n=9, lost=(3, 4)), 8, 8)
    for x, y, unreadable in results:
        torch.testing.assert_close(torch.tensor(x), single.x)
        assert y == single.y.tolist()
        assert unreadable == ["square-3", "square-4"]
