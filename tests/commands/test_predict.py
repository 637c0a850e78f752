"""`dinokit predict`: labels by a saved head and by k-NN, against the evaluators and scikit-learn."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import dinokit
from dinokit.__main__ import main
from dinokit.weights import save_backbone

CLASSES = ("circle", "square", "bar")


def shape(kind: str, seed: int) -> Image.Image:
    rng = np.random.default_rng([seed, CLASSES.index(kind)])
    pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
    y, x = np.mgrid[:32, :32] - 15.5
    inside = {"circle": x**2 + y**2 < 90, "square": np.maximum(abs(x), abs(y)) < 12, "bar": abs(x) < 3}[kind]
    pixels[inside] = rng.integers(120, 255, (int(inside.sum()), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def labelled(tmp_path):
    for split, seeds in (("train", range(12)), ("test", range(20, 26))):
        for kind in CLASSES:
            (tmp_path / split / kind).mkdir(parents=True)
            for seed in seeds:
                shape(kind, seed).save(tmp_path / split / kind / f"{seed}.png")
    return tmp_path


@pytest.fixture
def weights(tmp_path):
    backbone = dinokit.create_model("pixels", size=32, grid=8)
    path = tmp_path / "pixels.safetensors"
    save_backbone(path, backbone, {"name": "pixels", "channels": 3, "size": 32, "grid": 8})
    return path


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def data(labelled) -> list[str]:
    sets = [f"{split}.path={labelled / split}" for split in ("train", "test")]
    return [*sets, "workers=0", "cache=null"]


def test_knn_gives_the_labels_that_the_evaluator_counts_as_right(weights, labelled, capsys):
    settings = [f"weights={weights}", *data(labelled), "k=[5]", f"out={labelled / 'knn'}"]
    assert main(["eval", "knn", *settings]) == 0
    capsys.readouterr()
    words = [f"labelled.path={labelled / 'train'}", f"data.path={labelled / 'test'}", "k=5", "workers=0"]
    assert main(["predict", f"weights={weights}", *words]) == 0
    rows = rows_of(capsys.readouterr().out)
    right = [row["label"] == Path(row["file"]).parent.name for row in rows]
    scores = dinokit.evaluate(
        weights, "knn", train=labelled / "train", test=labelled / "test", k=[5], workers=0, cache=None
    )
    assert len(rows) == 18
    assert sum(right) / 18 == scores["top1@5"]
    assert sum(right) > 12
    assert all(0 < float(row["probability"]) <= 1 for row in rows)


@pytest.mark.parametrize("evaluator", ["linear", "logreg"])
def test_a_saved_head_labels_as_well_as_the_evaluator_says(weights, labelled, capsys, evaluator):
    grid = {"linear": ["steps=60", "blocks=[1]", "pool=[false]", "lr=[0.1,1]", "step_batch=36"],
            "logreg": ["powers=[0,0]", "count=1"]}[evaluator]  # fmt: skip
    out = labelled / "heads"
    settings = [f"weights={weights}", *data(labelled), *grid, f"out={out}"]
    assert main(["eval", evaluator, *settings, "--traceback"]) == 0
    capsys.readouterr()
    table = labelled / "labels.csv"
    head = next(out.rglob("classifier.safetensors"))
    words = [f"weights={weights}", f"head={head.parent}", f"data.path={labelled / 'test'}", f"out={table}"]
    assert main(["predict", *words, "workers=0", "--traceback"]) == 0
    rows = rows_of(table.read_text())
    right = sum(row["label"] == Path(row["file"]).parent.name for row in rows)
    assert right >= 15
    if evaluator == "logreg":
        files = [str(f) for kind in CLASSES for f in sorted((labelled / "train" / kind).iterdir())]
        # the evaluator's own view: resize = size
        view = dinokit.transform(weights, size=32, resize=32)
        x = np.stack([view(file).flatten().numpy() for file in files])
        backbone = dinokit.load_backbone(weights)
        x = torch.stack([backbone([view(file)[None]], [None])[0].cls[0] for file in files]).numpy()
        model = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(
            x, [Path(f).parent.name for f in files]
        )
        test = torch.stack([backbone([view(r["file"])[None]], [None])[0].cls[0] for r in rows]).numpy()
        theirs = model.predict_proba(test).max(axis=1)
        assert np.allclose([float(row["probability"]) for row in rows], theirs, atol=2e-3)


def test_files_are_labelled_in_their_order_and_unreadable_ones_are_left_empty(weights, labelled, capsys):
    broken = labelled / "broken.png"
    broken.write_bytes(b"nothing")
    files = [str(labelled / "test/bar/20.png"), str(broken), str(labelled / "test/circle/21.png")]
    settings = [f"weights={weights}", f"labelled.path={labelled / 'train'}", "k=3", "workers=0"]
    assert main(["predict", *settings, *files]) == 0
    shown = capsys.readouterr()
    rows = rows_of(shown.out)
    assert [row["file"] for row in rows] == files
    assert (rows[1]["label"], rows[1]["probability"]) == ("", "")
    assert "3 images, 1 of them cannot be read" in shown.err
    found = dinokit.predict(weights, files, labelled=labelled / "train", k=3)
    assert [row.label for row in found] == [row["label"] for row in rows]
    assert main(["predict", *settings, *files, "--json", "--quiet"]) == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert [row["label"] for row in labels] == [row["label"] or None for row in rows]
    assert [row["file"] for row in labels] == files
    assert labels[1]["probability"] is None
    assert (
        main(["predict", *settings, *files, f"out={labelled}"]) == 3
    )  # before the work, which would be lost
    assert "is a folder, and a file is to be written there" in capsys.readouterr().err


def test_an_image_without_a_label_in_a_list_is_counted_and_does_not_vote(weights, labelled, capsys):
    files = [labelled / "train" / kind / "0.png" for kind in CLASSES]
    rows = [f"{file},{kind}" for file, kind in zip(files, CLASSES, strict=True)]
    asked = labelled / "test" / CLASSES[0] / "20.png"
    (labelled / "list.csv").write_text("\n".join(["path,label", *rows, f"{asked},"]))  # the same, unlabelled
    words = [f"weights={weights}", f"labelled.path={labelled / 'list.csv'}", "k=1", "workers=0"]
    assert main(["predict", *words, str(asked)]) == 0
    shown = capsys.readouterr()
    assert "1 of 4 labelled images have no label and do not vote." in shown.err
    assert rows_of(shown.out)[0]["label"] in CLASSES


def test_a_head_of_other_weights_or_none_is_refused(weights, labelled, tmp_path, capsys):
    other = dinokit.create_model("pixels", size=32, grid=4)
    save_backbone(tmp_path / "b.safetensors", other, {"name": "pixels", "channels": 3, "size": 32, "grid": 4})
    settings = [*data(labelled), "powers=[0,0]", "count=1", f"out={tmp_path / 'h'}"]
    assert main(["eval", "logreg", f"weights={weights}", *settings]) == 0
    head = next((tmp_path / "h").rglob("classifier.safetensors"))
    for words, text in (
        ([f"weights={tmp_path / 'b.safetensors'}", f"head={head}"], "features of other weights"),
        ([f"weights={weights}", f"head={tmp_path}"], "There is no classifier"),
        ([f"weights={weights}", f"head={weights}"], "no classifier that dinokit eval"),
        ([f"weights={weights}"], "Give either head="),
    ):
        capsys.readouterr()
        assert main(["predict", *words, f"data.path={labelled / 'test'}"]) != 0
        assert text in capsys.readouterr().err
