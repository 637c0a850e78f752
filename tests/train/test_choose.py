"""A recipe chosen for a folder of images and for this machine: `dinokit train data.path=PHOTOS`."""

import numpy as np
import pytest
from PIL import Image

from dinokit.__main__ import main
from dinokit.config.load import load_recipe
from dinokit.config.values import source_of
from dinokit.train.choose import choose

QUICK = ["optim.steps=3", "run.workers=0", "backbone.depth=1", "run.precision=fp32", "evals.knn=null"]


@pytest.fixture
def folder(tmp_path):
    """make(count, side, grey): a folder of images."""

    def make(count=40, side=200, grey=False):
        path = tmp_path / "animals"
        path.mkdir()
        rng = np.random.default_rng(0)
        for i in range(count):
            pixels = rng.integers(100, 200, (side, side + 40, 1 if grey else 3), dtype=np.uint8)
            Image.fromarray(np.broadcast_to(pixels, (side, side + 40, 3)).copy()).save(path / f"{i:03}.png")
        return path

    return make


def recipe_of(choice, path):
    return load_recipe(choice.recipe, [*choice.settings(), f"data.path={path}"])


def test_colours_batch_and_crops_follow_the_images(folder):
    path = folder(40, 200)
    choice, source = choose([f"data.path={path}"], "cpu")
    recipe = recipe_of(choice, path)
    assert len(source) == 40
    assert recipe.optim.batch == 8  # a quarter of the images
    assert (recipe.crops.globals.size, recipe.crops.locals.size) == (64, 32)
    assert recipe.crops.mean == pytest.approx((149.5 / 255,) * 3, abs=0.01)
    assert recipe.crops.std == pytest.approx((100 / 12**0.5 / 255,) * 3, abs=0.01)
    assert recipe.crops.saturation > 0
    assert set(choice.reasons) == set(choice.overrides)


def test_small_and_grey_images_get_small_crops_and_no_colour(folder):
    path = folder(20, 32, grey=True)
    recipe = recipe_of(choose([f"data.path={path}"], "cpu")[0], path)
    assert (recipe.crops.globals.size, recipe.backbone["patch"]) == (32, 4)
    assert (recipe.crops.saturation, recipe.crops.hue, recipe.crops.gray) == (0, 0, 0)


def test_settings_of_the_source_are_read_as_in_a_recipe(folder):
    path = folder(20, 40)
    choice, source = choose([f"data.path={path}", "data.split=train", "backbone.channels=1"], "cpu")
    assert len(source) < 20
    assert len(recipe_of(choice, path).crops.mean) == 1


def test_too_few_images_are_refused_with_what_to_do(folder):
    with pytest.raises(ValueError, match="There are 9 images: a network learns from hundreds at least"):
        choose([f"data.path={folder(9, 40)}"], "cpu")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("a/b", "folder"), ("x.parquet", "parquet"), ("x.tar", "tar"), ("list.txt", "manifest")],
)
def test_the_kind_of_source_follows_from_the_path(path, kind):
    assert source_of(path) == kind


@pytest.mark.slow
def test_a_run_without_a_recipe_says_its_choices_keeps_what_is_given_and_resumes(
    folder, tmp_path, monkeypatch, capsys
):
    path = folder(20, 40)
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"data.path={path}", *QUICK, "optim.batch=4"]) == 0
    text = capsys.readouterr().err
    assert "20 images, shorter side 40 to 40 pixels" in text
    assert "backbone.size=32  (the images have 40 pixels)" in text
    assert "optim.batch" not in text.split("recipe laptop, with:")[1].split("laptop: ")[0]  # it was given
    recipe = load_recipe(tmp_path / "runs/animals/recipe.yaml")
    assert (recipe.optim.batch, recipe.optim.steps) == (4, 3)
    assert main(["train", f"data.path={path}", *QUICK, "optim.batch=4", "minutes=9"]) == 0  # finished
    assert "runs/animals was begun with optim.steps=3, which stays; minutes=9 is" in capsys.readouterr().err


def test_minutes_become_steps_by_the_measured_speed(folder, tmp_path, monkeypatch, capsys):
    path = folder(20, 32)
    monkeypatch.chdir(tmp_path)
    assert main(["show", f"data.path={path}", "minutes=2", "run.workers=0", "backbone.depth=1"]) == 0
    out = capsys.readouterr()
    line = next(x for x in out.err.splitlines() if x.startswith("  optim.steps="))
    steps, seconds = int(line.split("=")[1].split()[0]), float(line.split(" at ")[1].split()[0])
    assert steps == pytest.approx(0.9 * 120 / seconds, rel=0.1) or steps == 50
    assert f"steps: {steps}" in out.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("minutes", ["0", "-5", "inf", "nan", "long"])
def test_minutes_that_are_no_time_are_refused(folder, minutes, capsys):
    assert main(["show", f"data.path={folder(20, 40)}", f"minutes={minutes}"]) == 2
    assert f"minutes={minutes}: it is a number above 0" in capsys.readouterr().err


def test_images_with_labels_are_trained_on_in_their_training_split(folder):
    path = folder(30, 40)
    for i, image in enumerate(sorted(path.iterdir())):
        part = path / ("train" if i < 20 else "test") / f"class{i % 2}"
        part.mkdir(parents=True, exist_ok=True)
        image.rename(part / image.name)
    choice, source = choose([f"data.path={path}", "data.labels=folders"], "cpu")
    assert (choice.overrides["data.split"], len(source)) == ("train", 20)
    assert len(choose([f"data.path={path}", "data.labels=folders", "data.split=all"], "cpu")[1]) == 30


def test_minutes_beside_a_recipe_are_refused(folder):
    assert main(["train", "laptop", "data.path=x", "minutes=3"]) != 0
