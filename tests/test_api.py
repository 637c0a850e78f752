"""`import dinokit`: its names, and what they do with images in memory and on disk."""

import ast
import json
import pickle
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

import dinokit
from dinokit.features import normalised
from dinokit.weights import save_backbone
from dinokit.weights.formats import section_of

ROOT = Path(__file__).parent.parent
SHADES = {"dark": 40, "light": 190}


def picture(shade: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(shade, shade + 40, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def labelled(tmp_path):
    for split, seeds in (("train", range(6)), ("test", range(10, 13))):
        for name, shade in SHADES.items():
            folder = tmp_path / "labelled" / split / name
            folder.mkdir(parents=True)
            for seed in seeds:
                picture(shade, seed + shade).save(folder / f"{seed}.png")
    return tmp_path / "labelled"


@pytest.fixture
def weights(drawn, tmp_path):
    vit = drawn(width=64, heads=1, registers=2)
    path = tmp_path / "vit.safetensors"
    save_backbone(path, vit, section_of(vit))
    return path


def files(folder: Path) -> list[str]:
    return sorted(map(str, folder.rglob("*.png")))


def test_importing_dinokit_imports_next_to_nothing():
    """What keeps it under 20 milliseconds; time itself would depend on the machine."""
    code = (
        "import sys; before = set(sys.modules); import dinokit; new = set(sys.modules) - before;"
        "assert {m.partition('.')[0] for m in new} <= {'dinokit', 'typing', '_typing', 'collections'}, new;"
        "assert {m for m in new if m.startswith('dinokit')} == {'dinokit'}, new;"
        "assert set(dinokit.__all__) <= set(dir(dinokit))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not run.returncode, run.stderr


def test_the_documentation_names_what_there_is():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    headings = {match[1] for match in re.finditer(r"^## `(\w+)`", text, re.M)}
    assert headings == set(dinokit.__all__)
    used = {m[1] for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
            for m in re.finditer(r"\bdinokit\.([a-z_A-Z]+)\(", page.read_text(encoding="utf-8"))}  # fmt: skip
    assert used <= set(dinokit.__all__)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= len(dinokit.__all__)
    for block in blocks:
        ast.parse(block)


def test_type_checkers_see_the_names_that_are_loaded_later():
    tree = ast.parse((ROOT / "dinokit/__init__.py").read_text(encoding="utf-8"))
    shown = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(dinokit.__all__) <= shown


def test_every_name_is_there_and_a_wrong_one_is_answered_with_the_right_one():
    assert all(callable(getattr(dinokit, name)) for name in dinokit.__all__ if name != "viz")
    assert dinokit.viz.pca
    with pytest.raises(AttributeError, match="Did you mean 'load_backbone'"):
        dinokit.load_backbones  # noqa: B018
    import_module("dinokit.train.schedule")
    assert callable(dinokit.train)


def test_models_are_listed_and_made():
    assert dinokit.list_models("dinov2_vits*") == ["dinov2_vits14", "dinov2_vits14_reg"]
    assert {"vit", "timm_vit"} <= set(dinokit.list_models())
    vit = dinokit.create_model("vit", size=32, patch=8, width=64, depth=1, heads=1)
    assert (vit.width, vit.training) == (64, False)
    assert dinokit.create_model("dinov2_vits14").width == 384
    with pytest.raises(LookupError, match="Did you mean 'dinov2_vits14'"):
        dinokit.create_model("dinov2_vit_s14")
    with pytest.raises(ValueError, match="no released weights"):
        dinokit.create_model("vit", pretrained=True)


def test_encode_gives_the_tokens_of_the_backbone(weights):
    backbone = dinokit.load_backbone(weights)
    prepared = dinokit.transform(backbone)(picture(40, 0))
    raw = dinokit.transform(backbone).fit(picture(40, 0))
    assert torch.equal(prepared, normalised(backbone, raw[None])[0])
    expected = backbone([prepared[None]], [None])[0]
    tokens = ["cls", "mean", "patch", "registers"]
    found = dinokit.encode(backbone, picture(40, 0), tokens=tokens, precision="fp32")
    torch.testing.assert_close(found["cls"], expected.cls)
    torch.testing.assert_close(found["mean"], expected.patches.mean(dim=1))
    torch.testing.assert_close(found["patch"], expected.patches)
    torch.testing.assert_close(found["registers"], expected.registers)
    layers = dinokit.encode(backbone, [picture(40, 0)] * 3, layers="last2", batch=2, precision="fp32")
    assert layers.shape == (3, 2, 64)
    torch.testing.assert_close(layers[2, 1], expected.cls[0])


def test_a_file_a_picture_an_array_and_a_tensor_have_the_same_features(weights, labelled):
    file = files(labelled)[0]
    image = Image.open(file)
    array = np.asarray(image)
    rows = [dinokit.encode(weights, form) for form in (file, image, array, torch.tensor(array).movedim(2, 0))]
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0])
    everything = dinokit.encode(weights, labelled / "train")
    torch.testing.assert_close(everything[0], dinokit.encode(weights, files(labelled / "train")[0])[0])


def test_an_unreadable_image_and_different_grids_are_refused(weights, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png cannot be read.*dinokit.extract\(\)"):
        dinokit.encode(weights, tmp_path / "a.png")
    images = [np.zeros((28, 42, 3), np.uint8), np.zeros((56, 42, 3), np.uint8)]
    with pytest.raises(ValueError, match="different numbers"):
        dinokit.encode(weights, images, "patch", fit="resize")
    assert dinokit.encode(weights, images, "cls", fit="resize").shape == (2, 64)


def test_extract_search_and_evaluate_from_a_folder(weights, labelled, tmp_path):
    exact = {"precision": "fp32"}
    store = dinokit.extract(
        weights, labelled / "train", tmp_path / "out", dtype="float32", workers=0, **exact
    )
    assert store["cls"].shape == (12, 64)
    found = dinokit.encode(weights, labelled / "train", **exact)
    torch.testing.assert_close(torch.from_numpy(store["cls"][:]), found, rtol=1e-4, atol=1e-5)
    query = files(labelled / "train")[3]
    (found,) = dinokit.search(tmp_path / "out", query, k=2)
    assert found[0][0] == query
    assert found[0][1] == pytest.approx(1, abs=1e-4)
    assert dinokit.search(tmp_path / "out", Image.open(query), k=1)[0][0][0] == query
    scores = dinokit.evaluate(
        weights, "knn", train=labelled / "train", test=labelled / "test", k=[3], workers=0, cache=None
    )
    assert scores["images_test"] == 6
    assert 0 <= scores["top1@3"] <= 1


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_encode_extract_and_the_embedder_compute_in_one_precision(weights, labelled, tmp_path, precision):
    images, same = labelled / "train", {"precision": precision}
    store = dinokit.extract(weights, images, tmp_path / "out", dtype="float32", workers=0, **same)
    found = dinokit.encode(weights, images, **same)
    assert torch.equal(torch.from_numpy(store["cls"][:]), found)
    assert np.array_equal(dinokit.Embedder(weights, **same).transform(images), found.numpy())
    exact = dinokit.encode(weights, images, precision="fp32")
    assert precision == "auto" or not torch.equal(exact, found)
    torch.testing.assert_close(exact, found, rtol=0.05, atol=0.05)


class Shades(torch.utils.data.Dataset):
    classes = tuple(SHADES)

    def __init__(self, seeds):
        self.items = [(picture(SHADES[name], seed), i) for seed in seeds for i, name in enumerate(SHADES)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_evaluate_takes_datasets_of_torch(tmp_path):
    pixels = dinokit.create_model("pixels", size=32, grid=4)
    scores = dinokit.evaluate(
        pixels, train=Shades(range(5)), test=Shades(range(10, 14)), k=[3], workers=0, out=tmp_path
    )
    assert scores["top1@3"] == 1.0
    assert '"eval": "knn"' in (tmp_path / "results.jsonl").read_text()


TINY = {
    "backbone.width": 64, "backbone.depth": 1, "backbone.heads": 1, "optim.steps": 6, "optim.batch": 4,
    "optim.warmup": 1, "run.workers": 0, "run.precision": "fp32", "run.log_every": 1, "run.report": False,
    "heads.cls.prototypes": 16, "heads.cls.hidden": 16, "heads.cls.bottleneck": 8, "run.device": "cpu",
    "evals.knn.every": 3, "evals.knn.workers": 0, "backbone.size": 32, "crops.globals.size": 32,
    "crops.locals.size": 16, "crops.locals.count": 1,
}  # fmt: skip


def test_train_takes_a_dataset_and_functions_and_is_stopped_and_resumed_by_them(tmp_path):
    seen: list[tuple[int, str]] = []

    def note(step, values, backbone):
        assert backbone.width == 64
        seen.extend((step, key) for key in values if key in ("dino", "loss") or "/" in key)
        return step == 3

    images = Shades(range(8))
    run = dinokit.train(images, "laptop", TINY, out=tmp_path / "run", callbacks=[note])
    assert run == tmp_path / "run"
    assert max(step for step, _ in seen) <= 4
    assert len(list((run / "checkpoints").iterdir())) >= 1
    again: list[int] = []
    with pytest.raises(ValueError, match=r"callbacks=\[FUNCTION\]"):
        dinokit.train(images, "laptop", TINY, out=run, callbacks=note)
    dinokit.train(images, "laptop", TINY, out=run, callbacks=[lambda step, values, _: again.append(step)])
    assert again[0] >= 3
    assert again[-1] == 6
    backbone = dinokit.load_backbone(run)
    assert dinokit.encode(backbone, images).shape == (16, 64)
    with pytest.raises(ValueError, match="no file holds them"):
        dinokit.train(None, run / "recipe.yaml", {"optim.steps": 8, "run.out": str(tmp_path / "other")})


TOGETHER = """
import json, sys
from pathlib import Path

import dinokit
from dinokit.runtime.distributed import rank

out, settings, seen = Path(sys.argv[1]), json.loads(sys.argv[2]), []


def note(step, values, backbone):
    scores = {key: value for key, value in values.items() if key == "contrastive" or "/" in key}
    seen.append([step, scores, backbone.width])
    (out / f"rank{rank()}.json").write_text(json.dumps(seen))
    return rank() == 1 and step == 3


assert dinokit.train(None, "laptop", settings, out=out / "run", callbacks=[note]) == out / "run"
"""


@pytest.mark.slow
def test_two_processes_call_the_callbacks_with_the_same_scores_and_one_of_them_stops_both(tmp_path):
    settings = {**TINY, "data.name": "scenes", "data.size": 32, "data.count": 40, "data.test_count": 20,
                "crops.decode": "whole"}  # fmt: skip
    (tmp_path / "script.py").write_text(TOGETHER)
    words = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *words, tmp_path / "script.py", tmp_path, json.dumps(settings)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert max(step for step, *_ in first) in (3, 4)
    assert any("knn/top1@20" in scores for _, scores, _ in first)
    assert any("contrastive" in scores for _, scores, _ in first)


def test_a_recipe_is_chosen_for_a_folder_as_on_the_command_line(labelled, tmp_path):
    settings = {"optim.steps": 2, "backbone.depth": 1, "run.workers": 0, "evals": None, "run.report": False}
    more = {"run.precision": "fp32", "run.device": "cpu", "optim.batch": 4}
    # twelve images are refused, eighteen are enough
    with pytest.raises(ValueError, match="There are 12 images"):
        dinokit.train(labelled / "train", settings={**settings, **more}, out=tmp_path / "a")
    run = dinokit.train(labelled, settings={**settings, **more}, out=tmp_path / "run")
    assert (run / "teacher.safetensors").is_file()


def test_the_embedder_works_in_a_pipeline_of_scikit_learn(weights, labelled):
    x = files(labelled)
    y = [Path(file).parent.name for file in x]
    pixels = dinokit.create_model("pixels", size=32, grid=4)
    pipeline = make_pipeline(dinokit.Embedder(pixels), LogisticRegression())
    assert cross_val_score(pipeline, x, y, cv=3).mean() == 1.0
    embedder = dinokit.Embedder(str(weights), tokens="mean", unit=True)
    pipeline = make_pipeline(clone(embedder), LogisticRegression(max_iter=1000)).fit(x, y)
    copy = pickle.loads(pickle.dumps(pipeline))
    assert list(copy.predict(x)) == list(pipeline.predict(x))
    assert repr(pipeline)
    assert pipeline._repr_html_()
    vectors = embedder.fit_transform(x)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert len(embedder.get_feature_names_out()) == vectors.shape[1]
    pipeline.set_params(embedder__size=28)
    assert pipeline.get_params()["embedder__size"] == 28
    with pytest.raises(ValueError, match="no parameter 'sise'"):
        embedder.set_params(sise=3)


def test_the_embedder_needs_no_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    embedder = dinokit.Embedder(dinokit.create_model("pixels", size=32, grid=2))
    assert embedder.fit_transform(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 12)
