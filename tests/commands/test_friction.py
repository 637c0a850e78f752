"""What stopped people at their first try: a mistake is answered with what to type, a result in words."""

import csv
import json
import time
from io import StringIO

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dinokit.__main__ import main
from dinokit.commands._sentence import sentence
from dinokit.commands.extract import Screen
from dinokit.config import registry
from dinokit.curate.settings import Balance
from dinokit.results import record
from dinokit.runtime import log
from dinokit.runtime.files import unused
from dinokit.weights import save_backbone

VIT = {"name": "vit", "width": 8, "depth": 1, "heads": 1, "size": 16, "patch": 8}


@pytest.fixture
def photos(tmp_path):
    """Labelled images: train/red, train/blue, test/red, test/blue."""
    for split, count in {"train": 6, "test": 2}.items():
        for kind, colour in {"red": (250, 0, 0), "blue": (0, 0, 250)}.items():
            folder = tmp_path / "photos" / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (20, 20), colour)
                noise = np.random.default_rng([number, count, len(kind)]).integers(0, 99, (20, 20, 3))
                image = Image.blend(image, Image.fromarray(noise.astype(np.uint8)), 0.5)
                image.save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path):
    save_backbone(tmp_path / "w.safetensors", registry.build("models", VIT), VIT)
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train", "scenes_cpu", "data.path=x"], "Add data.name=folder for a folder of images"),
        (["eval", "knn", "weights=x", "train=DIR"], "train=DIR: it is a section. Give train.path=DIR"),
        (["extract", "weights=x", "data=DIR", "out=y"], "data=DIR: it is a section. Give data.path=DIR"),
        (["train", "small_photos", "data=DIR"], "Give data.path=DIR"),
    ],
)
def test_a_path_at_the_wrong_key_is_answered_with_the_right_one(words, answer, capsys):
    assert main(words) == 2
    assert answer in capsys.readouterr().err


def test_the_folder_of_one_class_is_answered_with_the_folder_above(photos, capsys):
    data = [f"train.path={photos / 'train' / 'red'}", f"test.path={photos / 'test'}"]
    assert main(["eval", "knn", "backbone.name=pixels", "cache=null", *data]) == 3
    assert f"the folder above it, {photos / 'train'}, which has: blue, red." in capsys.readouterr().err


def test_weights_of_a_run_without_labels_ask_for_labelled_folders(photos, tmp_path, capsys):
    recipe = f"data: {{name: folder, path: {photos}, labels: none}}"
    save_backbone(tmp_path / "run.safetensors", registry.build("models", VIT), VIT, recipe)
    assert main(["eval", "knn", f"weights={tmp_path / 'run.safetensors'}"]) == 2
    answer = capsys.readouterr().err
    assert "needs labels" in answer
    assert "train.path=FOLDER and test.path=FOLDER" in answer


def test_a_result_begins_with_a_sentence_and_ends_with_json(photos, capsys, weights):
    data = [f"train.path={photos / 'train'}", f"test.path={photos / 'test'}"]
    assert main(["eval", "knn", f"weights={weights}", "k=2", "cache=null", *data]) == 0
    first, last = capsys.readouterr().out.splitlines()
    score = json.loads(last)["top1@2"]
    assert first.startswith(f"knn: {100 * score:.0f} % of 4 images right (by 2 neighbours); ")
    assert first.endswith("guessing among 2 classes 50 %, raw pixels 100 %.")
    assert '"images_train": 12,' in last  # and not 12.0


def test_sentences_of_other_scores():
    assert sentence("segmentation", {}, {"mIoU": 0.5}, 3) == (
        "segmentation: the classes of pixels overlap by 0.500 of 1 (mIoU)."
    )
    assert sentence("referring", {}, {"cIoU": 0.5, "mIoU": 0.6}, 3) == (
        "referring: what phrases ask for and the answers overlap by 0.500 of 1 (cIoU)."
    )
    assert sentence("mine", {}, {"something": 1}, 3) == ""


def test_results_hold_integers_and_only_settings_that_were_used():
    settings = {"method": "majority", "k": 7, "lr": 0.1, "size": 32}
    line = record("segmentation", "w", {"mIoU": 1.0, "images_test": 12.0}, settings, {})
    assert json.dumps(line["images_test"]) == "12"
    assert json.dumps(line["mIoU"]) == "1.0"
    assert line["about"]["settings"] == {"method": "majority", "size": 32}


def test_a_size_far_from_the_trained_one_is_warned_of(photos, capsys, weights):
    data = [f"train.path={photos / 'train'}", f"test.path={photos / 'test'}", "cache=null", "k=2"]
    assert main(["eval", "knn", f"weights={weights}", "size=64", *data]) == 0
    assert "size=64, but the backbone was trained on 16 pixels" in capsys.readouterr().err
    assert main(["eval", "knn", f"weights={weights}", "size=32", *data]) == 0
    assert "trained on" not in capsys.readouterr().err


def test_nothing_is_overwritten_in_silence(tmp_path):
    path = tmp_path / "nearest.png"
    for expected in ("nearest.png", "nearest_2.png", "nearest_3.png"):
        assert unused(path).name == expected
        unused(path).touch()


def test_no_speed_is_named_when_all_was_there():
    screen = Screen(10, 10)
    assert screen.speed() == {}
    screen(0, [])
    screen.done = 12
    assert screen.speed()["images_per_second"] > 0


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(log, "LINE_EVERY", 0.01)
    for _ in log.watch(range(4), 4, "features"):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"dinokit: features: {n} of 4" for n in (1, 2, 3)]
    assert Console(file=StringIO()).is_terminal is False


@pytest.mark.parametrize(("images", "levels"), [(1, (1, 1)), (150, (30, 7)), (100_000, (200, 50))])
def test_levels_fit_the_pool(images, levels):
    assert Balance().levels_of(images) == levels


def test_levels_that_do_not_fit_name_the_key():
    with pytest.raises(ValueError, match=r"balance\.levels=\[300, 40\]: 300 clusters of 150 images.*=30,7"):
        Balance(levels=(300, 40)).levels_of(150)


def test_a_small_pool_is_curated_at_once_with_a_table_and_sheets(photos, tmp_path, weights, capsys):
    pytest.importorskip("faiss")
    out = tmp_path / "out"
    words = [
        f"weights={weights}",
        f"pool.path={photos}",
        "dedup.similarity=1.1",
        "hash.bits=-1",
        f"out={out}",
    ]
    assert main(["curate", "curate_small", *words, "balance.images=8"]) == 0
    rows = list(csv.DictReader((out / "clusters.csv").read_text().splitlines()))
    assert len(rows) == 16
    assert sum(int(row["selected"]) for row in rows) == 8
    assert all(row["path"] not in (row["neighbour_1"], row["neighbour_5"]) for row in rows)
    assert all(float(row["similarity_1"]) >= float(row["similarity_5"]) for row in rows)
    clusters = {row["cluster"] for row in rows}
    assert {path.stem.lstrip("0") or "0" for path in (out / "clusters").glob("*.jpg")} == clusters


@pytest.mark.parametrize(
    "recipe",
    [
        "curate_small",
        "eval_scenes",
        "align_captioned_cpu",
        "instruct_captioned_cpu",
        "head_promptable_scenes",
    ],
)
def test_show_prints_recipes_of_other_commands(recipe, capsys):
    assert main(["show", recipe]) == 0
    assert recipe in capsys.readouterr().out
    assert main(["show", recipe, "a=1"]) == 2


def test_the_sub_keys_of_a_curation_are_in_its_help(capsys):
    assert main(["curate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in ("balance.levels", "dedup.similarity", "clusters.kmeans.iterations"))
