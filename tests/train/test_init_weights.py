"""Going on from weights that are there already."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.features import fingerprint
from dinokit.train import trainer
from dinokit.train.networks import build_backbone
from dinokit.train.pretrained import init_weights
from dinokit.train.student_teacher import StudentTeacher
from dinokit.weights import load_backbone, save_backbone


@pytest.fixture
def old(tiny, tmp_path):
    """A backbone file, made at twice the size of the run's crops."""
    torch.manual_seed(7)
    section = {**tiny("x").backbone, "size": 64}
    path = tmp_path / "old.safetensors"
    save_backbone(path, registry.build("models", section), section)
    return path


def train(recipe):
    return trainer.train(recipe, registry.build("data.sources", recipe.data))


def test_student_and_teacher_begin_with_the_file(tiny, old):
    out = train(tiny("a", f"backbone.weights={old}"))
    start, source = load_backbone(out / "start.safetensors"), load_backbone(old)
    crops = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(start([crops], [None])[0].cls, source([crops], [None])[0].cls)
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.backbone["fingerprint"] == fingerprint(start)
    assert recipe.backbone["weights"] == str(old)
    assert "weights" not in load_backbone(out).__dict__


def test_both_networks_are_filled_and_heads_are_not(tiny, old):
    recipe = tiny("a", f"backbone.weights={old}")
    torch.manual_seed(0)
    before = StudentTeacher(recipe).student.dino_head.state_dict()
    torch.manual_seed(0)
    model = StudentTeacher(recipe)
    filled = init_weights(recipe, model, resumes=False)
    student, teacher = model.student.backbone, model.teacher.backbone
    assert fingerprint(student) == fingerprint(teacher) == filled.backbone["fingerprint"]
    assert fingerprint(student) != fingerprint(build_backbone(recipe))
    assert all(torch.equal(before[k], v) for k, v in model.student.dino_head.state_dict().items())


def test_the_backbone_stands_still_while_the_heads_warm_up(tiny, old, saved):
    words = ["optim.head_warmup=3", "optim.warmup=1", "run.checkpoint_every=1", "run.keep=6"]
    out = train(tiny("a", f"backbone.weights={old}", *words))
    states = [saved(out / "checkpoints" / f"step_{i:07d}") for i in range(1, 7)]
    start = load_backbone(out / "start.safetensors").state_dict()

    def moved(state, who):
        return any(not torch.equal(state[f"{who}.backbone.{name}"], value) for name, value in start.items())

    for who in ("student", "teacher"):
        assert [moved(state, who) for state in states[:3]] == [False] * 3
        assert moved(states[5], who)
    head = "student.dino_head.mlp.0.weight"
    assert not torch.equal(states[1][head], states[2][head])


def test_a_run_goes_on_bit_for_bit_without_the_file_it_began_with(tiny, old, tmp_path, same_run, cut_short):
    words = [f"backbone.weights={old}", "optim.head_warmup=1"]
    whole = train(tiny("whole", *words))
    cut = tiny("broken", *words)
    cut_short(cut)
    old.write_bytes(b"something else")
    same_run(whole, train(cut))
    assert load_recipe(tmp_path / "broken" / "recipe.yaml").backbone["fingerprint"]


def test_weights_that_are_not_those_of_the_recipe_are_refused(tiny, old):
    recipe = tiny("a", f"backbone.weights={old}", "backbone.fingerprint=00ff")
    with pytest.raises(ValueError, match=r"old\.safetensors gives a backbone of fingerprint .* for 00ff"):
        train(recipe)
    assert not Path(recipe.run.out).exists()


def test_a_run_begun_from_other_weights_is_another_run(tiny, old):
    train(tiny("a", f"backbone.weights={old}"))
    with pytest.raises(ValueError, match=r"another recipe: backbone\.weights was .*, now absent"):
        train(tiny("a"))


def test_without_a_name_the_architecture_is_the_files(recipe_file, photos, old, tmp_path, capsys):
    text = recipe_file.read_text()
    nameless = re.sub(r"backbone: .*", 'backbone: {weights: "???", size: 32, drop_path: 0.1}', text)
    recipe_file.write_text(nameless)
    words = ["train", str(recipe_file), f"data.path={photos}", f"run.out={tmp_path / 'a'}"]
    assert main(words) == 2
    assert "backbone.weights must be given" in capsys.readouterr().err
    assert main([*words, f"backbone.weights={old}"]) == 0
    section = load_recipe(tmp_path / "a" / "recipe.yaml").backbone
    assert (section["width"], section["depth"], section["size"], section["drop_path"]) == (24, 2, 32, 0.1)


def test_the_end_of_a_run_shows_scores_and_drift_at_first_and_at_last(
    recipe_file, photos, old, tmp_path, capsys
):
    for i, path in enumerate(sorted(photos.iterdir())):
        (photos / f"class{i % 2}").mkdir(exist_ok=True)
        path.rename(photos / f"class{i % 2}" / path.name)
    words = [
        f"backbone.weights={old}", "data.labels=folders", "data.test_share=0.5",
        "evals.knn.every=3", "evals.knn.k=[1]", "evals.drift.every=3",
    ]  # fmt: skip
    for section in ("knn", "drift"):
        words += [f"evals.{section}.workers=0"]
    assert main(["train", str(recipe_file), f"data.path={photos}", f"run.out={tmp_path / 'a'}", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("drift/", "knn/")) and " so far" not in line]
    rows = {name: [float(x) for x in scores] for name, *scores in table}
    assert set(rows) == {"knn/top1@1", "drift/cosine", "drift/cosine_centred"}
    assert [rows[name][0] for name in ("drift/cosine", "drift/cosine_centred")] == pytest.approx(
        [1, 1], abs=1e-3
    )
    assert all(0 < rows[name][1] < 1 for name in ("drift/cosine", "drift/cosine_centred"))


def test_drift_without_a_beginning_says_what_to_give(tiny, recipe_file, photos, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(photos / "last.png")
    words = ["evals.drift.every=3", f"run.out={tmp_path / 'a'}", "data.test_share=0.5"]
    assert main(["train", str(recipe_file), f"data.path={photos}", *words]) == 2
    assert "against=FILE_OR_RUN must be given" in capsys.readouterr().err
