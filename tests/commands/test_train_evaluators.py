from PIL import Image

from dinokit import evaluation
from dinokit.commands.train import _evaluators
from dinokit.config.load import load_recipe
from dinokit.config.registry import build


def test_an_evaluator_of_a_run_leaves_out_as_many_unreadable_images_as_the_run_does(tmp_path):
    for split in ("train", "test"):
        for name, colour in {"red": (200, 0, 0), "blue": (0, 0, 200)}.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                shade = tuple(abs(x - 2 * i - len(split)) for x in colour)
                Image.new("RGB", (16, 16), shade).save(folder / f"{i}.png")
            (folder / "0.png").write_bytes(b"")
    words = ["data.name=folder", f"data.path={tmp_path}", "run.max_unreadable=0.3", "data.labels=folders"]
    sets = [f"evals.knn.{split}.path={tmp_path / split}" for split in ("train", "test")]
    recipe = load_recipe("scenes_cpu", [*words, *sets, "evals.knn.workers=0", "evals.knn.k=[1]"])
    (knn,) = (each for each in _evaluators(recipe, build("data.sources", recipe.data)) if each.name == "knn")
    assert knn.evaluate(evaluation.load_evaluated(None, {"name": "pixels"}, "cpu"))["images_unreadable"] == 4
