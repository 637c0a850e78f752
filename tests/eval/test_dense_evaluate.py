"""Whole dense evaluations on pictures whose truth is in their pixels, and trainings that are cut off."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinokit import evaluation
from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.config.values import keys_without_effect
from dinokit.data.predictions import NAME, Predictions
from dinokit.eval import depth, segmentation, video
from dinokit.models import Backbone, Input, Tokens


class Colours(Backbone):
    """A patch's feature is its mean colour, its square, and noise in the channels that say nothing."""

    def __init__(self):
        super().__init__()
        self.width, self.patch, self.channels, self.blocks = 6, 4, 3, nn.ModuleList()
        self.input = Input(32, (0.5,) * 3, (0.5,) * 3)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, crops, masks):
        result = []
        for x in crops:
            mean = torch.nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
            patches = torch.cat([mean, mean.square()], -1) * self.gain
            result.append(Tokens(patches.mean(1), patches[:, :0], patches))
        return result


SPLITS = ("train", "test")
HUES = np.array([(40, 40, 40), (220, 30, 30), (30, 200, 60)])


@pytest.fixture
def blobs(tmp_path):
    """Red and green rectangles on grey, aligned to patches, with a class and a depth for each colour."""
    rng = np.random.default_rng(0)
    for i in range(14):
        ids = np.zeros((32, 40), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, 5) * 4, rng.integers(0, 6) * 4
            ids[top : top + 12, left : left + 16] = label
        noise = rng.integers(0, 25, (32, 40, 3))
        split = "train" if i < 10 else "test"
        for kind, array in (
            ("images", (HUES[ids] + noise).astype(np.uint8)),
            ("masks", ids),
            ("depth", np.array([4000, 1000, 2000], np.uint16)[ids]),
        ):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{i}.png")
    return tmp_path


def sections(root, **more):
    return {s: {"name": "folders", "path": str(root), "split": s, **more} for s in SPLITS}


def config(module, name, usual, **values):
    """Of these settings, and those of the usual ones that are read with them."""
    settings = {"workers": 0, **usual, **values}
    left_out = keys_without_effect(module.Config, settings, name).keys() - values.keys()
    return module.Config(
        **section_values("eval", name, {k: settings[k] for k in settings if k not in left_out}, name)
    )


def segment(root, **values):
    data = sections(root, classes=["grey", "red", "green"])
    small = {"resize": 32, "crop": 32, "stride": 21, "steps": 60, "batch": 4, "lr": 0.05}
    return config(segmentation, "segmentation", {**data, **small}, **values)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "linear"},
        {"method": "linear", "augment": False},
        {"method": "knn", "k": 5},
        {"method": "logreg"},
    ],
)
def test_colours_are_segmented_by_colour_and_the_majority_is_far_below(blobs, method):
    scores = segmentation.evaluate(segment(blobs, **method), Colours())
    assert scores["mIoU"] > 0.7
    assert scores["images_train"] == 10
    assert json.loads(json.dumps(scores)) == scores
    base = segmentation.evaluate(segment(blobs, method="majority"), Colours())
    assert base["mIoU"] < 0.35
    assert base["iou red"] == 0


def test_several_scales_and_mirrors_average_to_one_answer(blobs):
    vit = registry.build(
        "models", {"name": "vit", "width": 24, "depth": 4, "heads": 2, "patch": 4, "size": 32}
    )
    values = {"method": "ms", "scales": [1.0, 1.5], "augment": False}
    scores = segmentation.evaluate(segment(blobs, **values), vit)
    assert 0 < scores["mIoU"] <= 1
    assert vit.training
    assert all(p.grad is None for p in vit.parameters())


def depth_config(root, **values):
    small = {"layers": 1, "norm": True, "crop": [32, 40], "steps": 150, "batch": 4, "lr": 0.03, "bins": 32}
    usual = {**sections(root, target="depth"), **small, "max_depth": 5.0}
    return config(depth, "depth", usual, **values)


def test_the_data_of_a_run_on_the_scenes_gives_both_kinds_of_map():
    data = {"name": "scenes", "size": 32, "count": 6, "test_count": 4, "seed": 0, "split": "train"}
    for name, module, values in (
        ("depth", depth, {"method": "mean", "max_depth": 25.0}),
        ("segmentation", segmentation, {"method": "majority"}),
    ):
        given = section_values("eval", name, {"workers": 0, **values}, name)
        scores = module.evaluate(module.Config(**evaluation.with_data(name, given, data)), Colours())
        assert (scores["images_train"], scores["images_test"]) == (6, 4)
    with pytest.raises(ValueError, match=r"train.path \(a folder with images/"):
        evaluation.with_data("depth", section_values("eval", "depth", {}, "depth"), {**data, "name": "tar"})


@pytest.mark.parametrize(("lr", "dead"), [(0.1, True), (1e-4, False)])
def test_a_head_whose_last_rectifier_died_is_reported(blobs, capsys, lr, dead):
    vit = registry.build(
        "models", {"name": "vit", "width": 24, "depth": 4, "heads": 2, "patch": 4, "size": 32}
    )
    few = {"method": "dpt", "features": 8, "steps": 4, "augment": False, "warmup": 0.0, "clip": 0.0}
    depth.evaluate(depth_config(blobs, **few, lr=lr), vit)
    assert ("predicts 0.001 m, the least depth, for every pixel" in capsys.readouterr().err) == dead


@pytest.mark.parametrize("augment", [True, False])
def test_depth_that_is_a_colour_is_found_far_better_than_by_the_mean(blobs, augment):
    base = depth.evaluate(depth_config(blobs, method="mean"), Colours())
    found = depth.evaluate(depth_config(blobs, augment=augment), Colours())
    assert found["rmse"] < 0.6 * base["rmse"]
    assert found["a1"] > base["a1"]
    depths = np.concatenate(
        [np.array(Image.open(p)).ravel() for p in sorted((blobs / "depth/train").iterdir())]
    )
    truth = [np.array(Image.open(p)) / 1000 for p in sorted((blobs / "depth/test").iterdir())]
    mean = depths.mean() / 1000
    assert base["rmse"] == pytest.approx(
        np.mean([np.sqrt(((t - mean) ** 2).mean()) for t in truth]), rel=1e-4
    )


def test_a_training_shorter_than_the_published_warm_up_learns_more_than_how_far_all_is(blobs):
    values = {"augment": False, "gradient_weight": 0.0, "flip": False}
    base = depth.evaluate(depth_config(blobs, method="mean"), Colours())
    found = depth.evaluate(depth_config(blobs, steps=80, **values), Colours())
    assert found["rmse"] < 0.7 * base["rmse"]


def test_a_saved_head_has_the_scores_that_it_had_when_it_was_trained(blobs, tmp_path):
    out = tmp_path / "out"
    first = segmentation.evaluate(segment(blobs, out=str(out), augment=False), Colours())
    again = segmentation.evaluate(segment(blobs, head=str(out / "segmentation_linear_head.pth")), Colours())
    assert again["mIoU"] == first["mIoU"]
    few = {"out": str(out / "d"), "augment": False, "bins": 256, "steps": 8}
    trained = depth.evaluate(depth_config(blobs, **few), Colours())
    file = str(out / "d" / "depth_linear_head.pth")
    assert (
        depth.evaluate(depth_config(blobs, head=file, min_depth=1e-3), Colours())["rmse"] == trained["rmse"]
    )


def enlarged(array, shape):
    """Every pixel of a larger array of that shape is the pixel that lies at the same share of the sides."""
    rows, columns = (
        [int(i * old / new) for i in range(new)] for new, old in zip(shape, array.shape, strict=True)
    )
    return np.array([[array[r, c] for c in columns] for r in rows])


def test_a_few_predictions_are_saved_with_images_and_truth(blobs, tmp_path):
    out = tmp_path / "seg"
    scores = segmentation.evaluate(segment(blobs, method="knn", k=5, out=str(out)), Colours())
    found = Predictions.read(out / NAME)
    assert found.classes == ["grey", "red", "green"]
    assert sorted(Path(sample.name).stem for sample in found.samples) == ["10", "11", "12", "13"]
    right = []
    for sample in found.samples:
        mask = np.array(Image.open(blobs / "masks/test" / Path(sample.name).name))
        assert max(sample.truth.shape) == 224
        assert (sample.truth == enlarged(mask, sample.truth.shape)).all()
        red = (sample.image[..., 0] > 150) & (sample.image[..., 1] < 90)
        assert ((sample.truth == 1) == red).mean() > 0.97  # the image is the one of the map
        right.append(sample.predicted == sample.truth)
    assert np.mean(right) == pytest.approx(scores["pixel accuracy"], abs=0.02)


def test_a_few_depths_are_saved_and_more_images_make_no_larger_file(blobs, tmp_path):
    depth.evaluate(depth_config(blobs, method="mean", out=str(tmp_path / "d")), Colours())
    found = Predictions.read(tmp_path / "d" / NAME)
    mean = np.mean([np.array(Image.open(p)).mean() / 1000 for p in (blobs / "depth/train").iterdir()])
    for sample in found.samples:
        metres = np.array(Image.open(blobs / "depth/test" / Path(sample.name).name)) / 1000
        assert sample.truth == pytest.approx(enlarged(metres, sample.truth.shape))
        assert sample.predicted == pytest.approx(np.full(sample.predicted.shape, mean), rel=1e-4)
    many = sections(blobs, target="depth")
    many["test"]["split"] = "all"
    cfg = depth_config(blobs, method="mean", out=str(tmp_path / "m"), overlap="allow", **many)
    assert depth.evaluate(cfg, Colours())["images_test"] == 14
    assert len(Predictions.read(tmp_path / "m" / NAME).samples) == 4


def test_a_training_that_was_stopped_resumes_with_the_same_settings_and_weights_alone(
    blobs, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "segmentation_scores", interrupted)
        with pytest.raises(KeyboardInterrupt):
            segmentation.evaluate(segment(blobs, out=str(out), steps=3), Colours())
    (state,) = out.glob(".segmentation_*.pt")  # trained to the end, and not evaluated yet
    assert torch.load(state, weights_only=True)["step"] == 3
    other = Colours()
    other.gain.data.mul_(2)
    segmentation.evaluate(segment(blobs, out=str(out), steps=3), other)
    segmentation.evaluate(segment(blobs, out=str(out), steps=3, lr=0.5), Colours())
    assert list(out.glob(".segmentation_*.pt")) == [state]  # theirs are gone, and this one was left alone
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # nothing is left to train
    segmentation.evaluate(segment(blobs, out=str(out), steps=3, workers=0), Colours())
    assert not list(out.glob(".segmentation_*.pt"))


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_head(blobs, tmp_path):
    def command(out):
        data = [
            f"{s}.{k}={v}"
            for s, section in sections(blobs, classes="[grey,red,green]").items()
            for k, v in section.items()
        ]
        sizes = ["resize=32", "crop=32", "stride=21", "batch=4"]
        settings = [*sizes, "steps=400", "save_every=20", "workers=0", "device=cpu"]
        backbone = ["backbone.name=raw_patches", "backbone.patch=4", "backbone.size=32"]
        words = ["eval", "segmentation", *backbone, *data, *settings, f"out={out}"]
        return [sys.executable, "-m", "dinokit", *words]

    quiet = {"capture_output": True, "text": True, "check": True, "timeout": 300}
    whole = subprocess.run(command(tmp_path / "whole"), **quiet)
    process = subprocess.Popen(command(tmp_path / "cut"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = time.monotonic() + 200
    while not list((tmp_path / "cut").glob("**/.segmentation_*.pt")) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (state,) = (tmp_path / "cut").glob("**/.segmentation_*.pt")
    step = torch.load(state, weights_only=True)["step"]
    assert 0 < step < 400
    rest = subprocess.run(command(tmp_path / "cut"), **quiet)
    assert _scores(rest.stdout) == _scores(whole.stdout)
    heads = []
    for name in ("whole", "cut"):
        (file,) = (tmp_path / name).glob("**/segmentation_linear_head.pth")
        heads.append(torch.load(file, weights_only=True))
    for key, value in heads[0]["state_dict"].items():
        assert torch.equal(value, heads[1]["state_dict"][key])


def _scores(text):
    return {k: v for k, v in json.loads(text.splitlines()[-1]).items() if "iou" in k.lower()}


def test_data_that_cannot_be_evaluated_are_refused(blobs):
    backbone = registry.build("models", {"name": "pixels"})
    with pytest.raises(ValueError, match=r"Pixels gives 0 patch features .*=raw_patches"):
        segmentation.evaluate(segment(blobs, method="knn"), backbone)
    data = {"name": "folders", "path": str(blobs), "classes": ["grey", "red", "green"]}
    with pytest.raises(
        ValueError, match=r"14 of 14 test images are train images too.* train.split=train test.split=test"
    ):
        segmentation.evaluate(segment(blobs, train=data, test=data), Colours())
    for path in (blobs / "depth" / "test").iterdir():
        Image.fromarray(np.full((32, 40), 9000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"None of the 4 test images has a reading between min_depth=0.001"):
        depth.evaluate(depth_config(blobs, method="mean"), Colours())


def test_data_without_any_reading_are_refused(blobs):
    for path in (blobs / "depth").rglob("*.png"):
        Image.fromarray(np.zeros((32, 40), np.uint16)).save(path)
    with pytest.raises(ValueError, match="have no reading: check depth_scale"):
        depth.evaluate(depth_config(blobs), Colours())


def test_a_cache_that_would_be_too_large_is_refused_with_its_size(blobs):
    with pytest.raises(ValueError, match=r"about \d+\.\d GiB, more than cache_gib=1e-07"):
        segmentation.evaluate(segment(blobs, augment=False, cache_gib=1e-7), Colours())


@pytest.mark.parametrize(
    ("module", "name", "values", "message"),
    [
        (segmentation, "segmentation", {"stride": 700}, "leaves gaps"),
        (segmentation, "segmentation", {"ratio": [2.0, 0.5]}, "smaller one first"),
        (segmentation, "segmentation", {"steps": 0}, "steps=0"),
        (depth, "depth", {"layers": 2}, "1 or 4 blocks"),
        (depth, "depth", {"crop": [5]}, "height and width"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(module, name, values, message):
    with pytest.raises(ValueError, match=message):
        config(module, name, {}, **values)


def test_the_published_numbers_are_the_defaults():
    linear, ms = segmentation.Config(), segmentation.Config(method="ms")
    assert (linear.resize, linear.crop, linear.stride) == (512, 512, 341)
    assert (linear.ratio, linear.scales) == ((0.5, 2.0), (1.0,))
    assert (ms.resize, ms.crop, ms.stride, ms.ratio) == (640, 640, 320, (1.0, 3.0))
    assert ms.scales == (1, 1.32, 1.73, 2.28, 3.0)
    assert round(linear.warmup * linear.steps) == 1500
    assert round(depth.Config().warmup * depth.Config().steps) == 12_800


@pytest.fixture
def davis(tmp_path):
    """A red and a green square that move over grey, one patch a frame."""
    for number in range(6):
        ids = np.zeros((48, 64), np.uint8)
        ids[8:24, 4 + 4 * number : 20 + 4 * number] = 1
        ids[28:44, 40 - 4 * number : 56 - 4 * number] = 2
        for kind, array, end in (
            ("JPEGImages", HUES[ids].astype(np.uint8), "jpg"),
            ("Annotations", ids, "png"),
        ):
            folder = tmp_path / kind / "480p" / "squares"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{number:05d}.{end}", quality=98)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("squares\n")
    return tmp_path


def video_config(root, **values):
    values = {"test": {"path": str(root), **values.pop("test", {})}, "size": 48, **values}
    return video.Config(**section_values("eval", "video", values, "video"))


def test_squares_that_move_are_followed(davis):
    scores = video.evaluate(video_config(davis), Colours())
    assert scores["J mean"] > 0.8
    assert scores["F mean"] > 0.8
    assert scores["J&F mean"] == pytest.approx((scores["J mean"] + scores["F mean"]) / 2)
    assert (scores["videos"], scores["objects"]) == (1, 2)


def test_finished_videos_are_not_evaluated_again_after_a_stop(davis, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(video, "all_reduce_sum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            video.evaluate(video_config(davis, out=str(out)), Colours())
    (state,) = out.glob(".video_*.pt")
    torch.save({"squares": [(0.5, 0.25), (0.5, 0.25)]}, state)
    assert video.evaluate(video_config(davis, out=str(out)), Colours())["J&F mean"] == 0.375
    assert not list(out.iterdir())


def test_a_video_without_a_mask_or_a_list_that_is_not_there_is_named(davis):
    with pytest.raises(ValueError, match=r"has no list 'vall'. Did you mean 'val'"):
        video.evaluate(video_config(davis, test={"list": "vall"}), Colours())
    (davis / "Annotations" / "480p" / "squares" / "00003.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 frames have no mask, .*00003.png"):
        video.evaluate(video_config(davis), Colours())
    with pytest.raises(ValueError, match="is not laid out as DAVIS 2017"):
        video.evaluate(video_config(davis / "JPEGImages"), Colours())
