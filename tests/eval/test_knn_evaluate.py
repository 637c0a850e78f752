"""Whole k-NN evaluations, from images to scores, on truths that are made here."""

import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.sources import shared_images
from dinokit.data.transforms import center_crop
from dinokit.eval.knn import Config, evaluate
from dinokit.models import Backbone, Input, Tokens

SPLITS = ("train", "test")


class Corner(Backbone):
    """A feature that is the image's first pixel, sharpened: a truth that tests can choose."""

    def __init__(self, channels=3):
        super().__init__()
        self.width, self.patch, self.channels, self.blocks = channels, 4, channels, nn.ModuleList()
        self.input = Input(16, (0.0,) * channels, (1.0,) * channels)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, crops, masks):
        return [Tokens(x[:, :, 0, 0] * self.gain, x[:, :0, 0], x[:, :, 0]) for x in crops]


HUES = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def paint(root, counts, noise=0):
    """Folders root/NAME with images in the colour of their name, every pixel moved by up to `noise`."""
    rng = np.random.default_rng(list(root.name.encode()))
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = np.clip(np.array(HUES[name]) + rng.integers(0, noise + 1, 3), 0, 255).astype(np.uint8)
            Image.fromarray(np.tile(colour, (20, 24, 1))).save(root / name / f"{i}.png")
    return {"name": "folder", "path": str(root), "labels": "folders"}


def config(**values):
    return Config(**section_values("eval", "knn", values, "knn"))


@pytest.fixture
def colours(tmp_path):
    train = paint(tmp_path / "a", {"red": 12, "green": 10, "blue": 8}, noise=60)
    return {"train": train, "test": paint(tmp_path / "b", {"red": 3, "green": 4, "blue": 5}, noise=60)}


def test_colours_are_distinguished_by_colour(colours):
    scores = evaluate(config(**colours, k=[1, 5, 1000]), Corner())
    assert scores == {"top1@1": 1.0, "top1@5": 1.0, "top1@1000": 1.0, "images_train": 30, "images_test": 12}


def test_the_scores_are_plain_numbers_for_a_line_of_json(colours):
    scores = evaluate(config(**colours, k=[1]), Corner())
    assert json.loads(json.dumps({"eval": "knn", **scores}))["top1@1"] == 1.0


def test_an_image_of_the_wrong_colour_costs_its_share(colours, tmp_path):
    Image.new("RGB", (20, 20), (0, 0, 250)).save(tmp_path / "b" / "red" / "wrong.png")
    assert evaluate(config(**colours, k=[5]), Corner())["top1@5"] == pytest.approx(12 / 13)


def test_an_unreadable_image_is_left_out_and_counted(colours, tmp_path):
    (tmp_path / "b" / "red" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "a" / "red" / "0.png").write_bytes(b"")
    scores = evaluate(config(**colours, k=[5], max_unreadable=0.1), Corner())
    assert scores == {"top1@5": 1.0, "images_train": 29, "images_test": 12, "images_unreadable": 2}


def test_more_unreadable_images_than_allowed_are_an_error_that_says_how_many_to_allow(colours, tmp_path):
    (tmp_path / "b" / "red" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"1 of the 13 test .*broken\.png.*such as max_unreadable=0\.08\."):
        evaluate(config(**colours, k=[5]), Corner())
    assert evaluate(config(**colours, k=[5], max_unreadable=0.08), Corner())["images_unreadable"] == 1


def test_the_backbone_is_left_as_it_was(colours):
    backbone = Corner().train()
    evaluate(config(**colours, k=[5]), backbone)
    assert backbone.training
    assert backbone.gain.requires_grad


def test_a_grey_backbone_gets_grey_images(colours):
    scores = evaluate(config(**colours, k=[1]), Corner(channels=1))
    assert scores["images_test"] == 12
    assert scores["top1@1"] < 1  # one number on a ray: the cosine of any two is 1


def test_few_shot_scores_stand_beside_the_full_ones(colours):
    scores = evaluate(config(**colours, k=[2, 10], few_shot=[1, 5], tries=3), Corner())
    names = ["top1@2", "top1@10", "top1@1 1-shot", "top1@2 5-shot", "top1@5 5-shot"]
    assert scores == {**dict.fromkeys(names, 1.0), "images_train": 30, "images_test": 12}


def test_a_class_with_too_few_images_for_the_shots_is_named(colours):
    with pytest.raises(ValueError, match=r"few_shot=9 .* but 'blue' has 8"):
        evaluate(config(**colours, few_shot=[9]), Corner())


def test_a_cut_takes_so_many_images(colours):
    scores = evaluate(config(**colours, k=[1], max_train=15, max_test=6), Corner())
    assert scores == {"top1@1": 1.0, "images_train": 15, "images_test": 6}


def test_scores_of_a_vit_on_built_in_scenes_match_the_definition():
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "size": 32}
    vit = registry.build("models", {"name": "vit", "layer_scale": 1.0, **sizes})
    halves = {
        split: {"name": "scenes", "size": 32, "count": 60, "test_count": 20, "split": split}
        for split in SPLITS
    }
    scores = evaluate(config(**halves, k=[10]), vit)
    x, y = {}, {}
    for split, section in halves.items():
        source = registry.build("data.sources", section)
        crops = torch.stack([center_crop(source[i][0], 37, 32) for i in range(len(source))])
        with torch.no_grad():
            x[split] = vit.eval()([(crops / 255 - 0.5) / 0.5], [None])[0].cls.double().numpy()
        y[split] = [source[i][1] for i in range(len(source))]
    other = KNeighborsClassifier(10, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    right = other.fit(x["train"], y["train"]).predict(x["test"]) == y["test"]
    assert scores["top1@10"] == pytest.approx(np.mean(right))


def test_images_without_labels_are_refused_with_the_key_to_set(colours):
    test = {**colours["test"], "labels": "none"}
    with pytest.raises(ValueError, match=r"The test images .* have no labels: set test.labels=folders"):
        evaluate(config(train=colours["train"], test=test), Corner())


def test_single_images_without_a_label_are_counted(colours, tmp_path):
    rows = ["path,label", "a/red/0.png,red", "a/green/0.png,green", "a/blue/0.png,blue", "a/blue/1.png,"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    train = {"name": "manifest", "path": str(tmp_path / "list.csv")}
    with pytest.raises(ValueError, match="1 of 4 train images have no label"):
        evaluate(config(train=train, test=colours["test"]), Corner())


def test_different_classes_are_named(colours, tmp_path):
    (tmp_path / "b" / "red").rename(tmp_path / "b" / "rouge")
    with pytest.raises(ValueError, match=r"only train has 'red' and only test has 'rouge'"):
        evaluate(config(**colours), Corner())


@pytest.mark.parametrize("splits", [("all", "all"), ("test", "test"), ("all", "test"), ("train", "all")])
def test_a_test_image_may_not_be_a_training_image(colours, splits):
    train, test = ({**colours["train"], "split": split} for split in splits)
    with pytest.raises(ValueError, match=r"test images are train images too, such as .*train\.split=train"):
        evaluate(config(train=train, test=test), Corner())


@pytest.mark.parametrize("evaluator", ["knn", "linear", "logreg"])
@pytest.mark.parametrize("way", ["whole/test", "./whole", "whole/train/../test", "link/test", "copy", "tar"])
def test_a_training_image_under_another_path_is_found_in_the_test_set(tmp_path, monkeypatch, evaluator, way):
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        paint(tmp_path / "whole" / split, {"red": 4, "green": 4, "blue": 4}, noise=60)
    (tmp_path / "link").symlink_to("whole")
    path = {"copy": "copy", "tar": "copy.tar"}.get(way, way)
    shutil.copytree("whole/test", "copy")
    with tarfile.open("copy.tar", "w") as tar:
        for file in sorted(Path("copy").rglob("*.png")):
            tar.add(file)
            label = tarfile.TarInfo(str(file.with_suffix(".cls")))
            label.size = len(file.parent.name)
            tar.addfile(label, BytesIO(file.parent.name.encode()))
    folders = {"name": "folder", "labels": "folders"}
    data = {"train": {**folders, "path": "whole"}, "test": {**folders, "path": path}}
    if way == "tar":
        data["test"] = {"name": "tar", "path": path}
    module, tiny = registry.find("eval", evaluator), {"linear": {"steps": 2, "blocks": [1], "pool": [False]}}
    tiny["logreg"] = {"count": 2, "iterations": 3}
    values = section_values("eval", evaluator, {**data, **tiny.get(evaluator, {})}, "")
    with pytest.raises(ValueError, match=r"test images are train images too, such as .*overlap=allow"):
        module.evaluate(module.Config(**values), Corner())
    scores = module.evaluate(module.Config(**{**values, "overlap": "allow"}), Corner())
    assert "top1_optimistic" in scores or "top1@10_optimistic" in scores
    assert "top1" not in scores
    assert scores["images_shared"] == (24 if way == "./whole" else 12)


def test_a_copy_of_one_image_among_thousands_of_one_size_is_found_in_a_sample(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3000), ("test", 2500)):
        (tmp_path / split).mkdir()
        for i in range(count):
            (tmp_path / split / f"{i}.png").write_bytes(rng.bytes(16))
    for i in range(0, 2500, 5):
        shutil.copy(tmp_path / "train" / f"{i}.png", tmp_path / "test" / f"{i}.png")
    train, test = (
        registry.build("data.sources", {"name": "folder", "path": str(tmp_path / s)}) for s in SPLITS
    )
    shared = shared_images(train, test)
    assert {int(Path(test.name(i)).stem) % 5 for i in shared} == {0}
    assert 300 < len(shared) <= 500


def test_a_missing_source_is_named():
    with pytest.raises(ValueError, match=r"train.name must be given; there is: .*folder"):
        evaluate(Config(), Corner())


@pytest.mark.parametrize(
    ("key", "value"),
    [("k", (5, 0)), ("few_shot", (0,)), ("tries", 0), ("max_test", -1), ("temp", 0.0), ("batch", 0)],
)
def test_a_number_that_makes_no_sense_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})


def test_no_neighbours_at_all_is_no_setting():
    with pytest.raises(ValueError, match="k is empty"):
        config(k=[])
